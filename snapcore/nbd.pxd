# The C API of the NBD data path: what an export is, and one connection.
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from snapcore.core cimport CoreState, VolumeState, pthread_cond_t
from snapcore.pages cimport pthread_mutex_t
from snapcore.volume cimport Volume


cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_t:
        pass


cdef enum:
    MAX_CONTEXTS = 16
    MAX_WORKERS = 64
    MAX_JOBS = 64


# A volume, or a raw file when there is none. `id` tells files and volumes apart whoever opened them; `quick`: a write
# to the file goes into the page cache.
cdef struct ExportState:
    CoreState *core
    VolumeState *volume
    # Pages that a walk of its trees takes with the lock held.
    const int64_t *slice_pages
    int descriptor
    uint64_t id[2]
    uint64_t size_bytes
    int writable
    int quick
    void *make_room

# `done`: so much of a read was answered.
cdef struct Request:
    uint16_t flags
    uint16_t kind
    uint64_t cookie
    uint64_t offset
    uint64_t length
    uint64_t done

# A request that a worker answers, from when on, and the data of a write.
cdef struct Job:
    Request request
    uint8_t *data
    uint64_t memory_bytes
    const ExportState *target
    uint64_t since_ns
    int running
    int answered
    int given_up
    # In the queue; among all that are under way; among all of the process that were given up and may still write.
    Job *next
    Job *before
    Job *after
    Job *next_overdue

cdef struct Context:
    uint32_t id
    VolumeState *base

cdef struct Outbox:
    uint8_t *data
    uint64_t bytes
    uint64_t capacity

cdef struct ConnectionState:
    int descriptor
    ExportState *target
    int structured
    int extended
    Context contexts[MAX_CONTEXTS]
    int context_count
    # Jobs: those that wait for a worker; all; how many of them are not answered, and how many were given up.
    pthread_mutex_t lock
    pthread_cond_t work
    pthread_cond_t ended
    Job *first
    Job *last
    Job *under_way
    int queued
    int jobs
    int given_up
    uint64_t job_bytes
    uint64_t given_up_bytes
    pthread_t workers[MAX_WORKERS]
    int worker_count
    int idle_workers
    int closing
    int stopping
    # Who has this sends, and says of jobs that they are answered.
    pthread_mutex_t sending
    int broken
    uint64_t answered
    # What was received and not looked at yet; answers that are not sent yet; data of a write or of a long read.
    uint8_t *inbox
    uint64_t inbox_start
    uint64_t inbox_end
    Outbox outbox
    uint8_t *payload
    uint64_t payload_capacity
    # Long writes come: a header is received without what follows it, which has a place of its own.
    int streaming
    # How often in a row nothing was found before sleeping; so many times it is not looked for now.
    int lookouts_failed
    int sleeps


cdef class Export:
    cdef ExportState *target
    cdef readonly Volume volume
    cdef object _make_room


cdef class Connection:
    cdef ConnectionState *connection
    cdef readonly Export export
    cdef object _bases
