"""Addresses and scalars that reach the device as arguments of a launch."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=range(1, 17))
def _fill_table_kernel(
    table_ptr,
    word_0: tl.int64,
    word_1: tl.int64,
    word_2: tl.int64,
    word_3: tl.int64,
    word_4: tl.int64,
    word_5: tl.int64,
    word_6: tl.int64,
    word_7: tl.int64,
    word_8: tl.int64,
    word_9: tl.int64,
    word_10: tl.int64,
    word_11: tl.int64,
    word_12: tl.int64,
    word_13: tl.int64,
    word_14: tl.int64,
    word_15: tl.int64,
):
    """Write sixteen words: in a captured CUDA graph they stay what they were."""
    tl.store(table_ptr + 0, word_0)
    tl.store(table_ptr + 1, word_1)
    tl.store(table_ptr + 2, word_2)
    tl.store(table_ptr + 3, word_3)
    tl.store(table_ptr + 4, word_4)
    tl.store(table_ptr + 5, word_5)
    tl.store(table_ptr + 6, word_6)
    tl.store(table_ptr + 7, word_7)
    tl.store(table_ptr + 8, word_8)
    tl.store(table_ptr + 9, word_9)
    tl.store(table_ptr + 10, word_10)
    tl.store(table_ptr + 11, word_11)
    tl.store(table_ptr + 12, word_12)
    tl.store(table_ptr + 13, word_13)
    tl.store(table_ptr + 14, word_14)
    tl.store(table_ptr + 15, word_15)
