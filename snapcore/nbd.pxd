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
    MAX_WORKERS = 8
    MAX_JOBS = 64


# A volume, or a raw file when there is none.
cdef struct ExportState:
    CoreState *core
    VolumeState *volume
    int descriptor
    uint64_t size_bytes
    int writable
    void *make_room

cdef struct Request:
    uint16_t flags
    uint16_t kind
    uint64_t cookie
    uint64_t offset
    uint64_t length

# A request that a worker answers.
cdef struct Job:
    Request request
    Job *next

cdef struct Context:
    uint32_t id
    VolumeState *base

cdef struct ConnectionState:
    int descriptor
    ExportState *target
    int structured
    int extended
    Context contexts[MAX_CONTEXTS]
    int context_count
    pthread_mutex_t lock
    pthread_cond_t changed
    Job *first
    Job *last
    int jobs
    uint64_t job_bytes
    pthread_t workers[MAX_WORKERS]
    int worker_count
    int idle_workers
    int closing
    int stopping
    pthread_mutex_t sending
    int broken
    uint64_t answered
    # What was received and not looked at yet; answers that are not sent yet; a write's data.
    uint8_t *inbox
    uint64_t inbox_start
    uint64_t inbox_end
    uint8_t *outbox
    uint64_t outbox_bytes
    uint64_t outbox_capacity
    uint8_t *payload
    uint64_t payload_capacity


cdef class Export:
    cdef ExportState *target
    cdef readonly Volume volume
    cdef object _make_room


cdef class Connection:
    cdef ConnectionState *connection
    cdef readonly Export export
    cdef object _bases
