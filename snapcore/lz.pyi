"""LZ4 blocks: many small buffers compressed in one call without the GIL, each decoded again and compared."""

from typing_extensions import Buffer

BLOCK_LIMIT_BYTES: int

def pack_blocks(blocks: list[Buffer], gain_divisor: int) -> list[bytes | None]:
    """Each block in the LZ4 block format; what comes back was decoded and compared.

    Parameters
    ----------
    blocks : list of contiguous bytes-like objects
        Of at most BLOCK_LIMIT_BYTES each.
    gain_divisor : int
        A block that does not shrink by this share of its length (1/gain_divisor) is given up.

    Returns
    -------
    list of bytes or None
        None where a block was given up.

    Raises
    ------
    ArithmeticError
        A block does not decode to what it was made of: memory or processor fail.
    """

def is_packed(packed: Buffer, data: Buffer) -> bool:
    """Whether an LZ4 block decodes to `data`, exactly; any bytes may be asked about."""
