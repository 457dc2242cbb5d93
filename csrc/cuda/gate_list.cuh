// The masked rows in order, listed by every block that needs them, and the blocks of a grid by their work.
//
// A block walks the mask in windows of 8192 tokens, 32 to a thread: one scan, and each thread knows
// the places of its own. A list in memory would be a launch of its own in front of every other.
#pragma once

#include "gate_rows.cuh"

namespace mmadapt {

constexpr int kWindow = 32 * kRowThreads;

// One window's masked rows, as a thread sees them.
struct Listed {
  uint32_t own;    // bit i: mask[start + 32 * thread + i]
  int32_t before;  // masked rows of the threads in front
  int32_t count;   // of the window
};

// Bit i: byte i is not zero.
__device__ __forceinline__ uint32_t nonzero_bits(uint4 bytes) {
  const uint32_t words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    bits |= static_cast<uint32_t>((words[i / 4] >> (8 * (i % 4)) & 0xff) != 0) << i;
  }
  return bits;
}

// Bit i: mask[i] of the next 32, `left` of which exist.
__device__ __forceinline__ uint32_t mask_bits(const uint8_t *__restrict__ mask, int64_t left) {
  uint32_t bits = 0;
  if (reinterpret_cast<uintptr_t>(mask) % sizeof(uint4) == 0 && left >= 32) {
    const auto *bytes = reinterpret_cast<const uint4 *>(mask);
    const uint4 low = bytes[0], high = bytes[1];
    bits = nonzero_bits(low) | nonzero_bits(high) << 16;
  } else {
#pragma unroll 1
    for (int i = 0; i < 32 && i < left; ++i) bits |= static_cast<uint32_t>(mask[i] != 0) << i;
  }
  return bits;
}

// For all threads of a block.
__device__ __forceinline__ Listed list_window(const uint8_t *__restrict__ mask, int64_t start,
                                              int64_t tokens) {
  __shared__ int32_t warp_sums[kRowWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t first = start + 32 * threadIdx.x;
  Listed listed;
  listed.own = mask_bits(mask + first, tokens - first);
  const int32_t here = __popc(listed.own);
  int32_t sum = here;
#pragma unroll
  for (int delta = 1; delta < 32; delta *= 2) {
    const int32_t left = __shfl_up_sync(kWholeWarp, sum, delta);
    if (lane >= delta) sum += left;
  }
  __syncthreads();  // the sums of the window before have been read
  if (lane == 31) warp_sums[warp] = sum;
  __syncthreads();
  listed.before = sum - here;
  listed.count = 0;
#pragma unroll
  for (int w = 0; w < kRowWarps; ++w) {
    const int32_t other = warp_sums[w];
    listed.before += w < warp ? other : 0;
    listed.count += other;
  }
  return listed;
}

// rows[i] = base + the window's (first + i)-th masked row for i < count, to be followed by a
// __syncthreads.
template <class Row>
__device__ __forceinline__ void put_rows(const Listed &listed, int32_t first, int32_t count,
                                         int64_t base, Row *rows) {
  int32_t at = listed.before - first;
  if (at >= count || at + __popc(listed.own) <= 0) return;
  for (uint32_t own = listed.own; own != 0; own &= own - 1, ++at) {
    if (at >= 0 && at < count) {
      rows[at] = static_cast<Row>(base + 32 * threadIdx.x + __ffs(own) - 1);
    }
  }
}

// The masked rows of every window in groups of up to eight, `parts` items of work to a group, dealt
// out to `blocks` blocks in turn: call(rows, count, part, place) for those of block `block`. Rows
// lie in shared memory; place is where the group starts if every group takes eight. All threads of
// the block call.
template <class Call>
__device__ __forceinline__ void each_group(const uint8_t *__restrict__ mask, int64_t tokens,
                                           int block, int blocks, int parts, Call call) {
  __shared__ int32_t rows[kRowWarps];
  int next = block;   // this block's next item, counted from the window's first
  int64_t place = 0;  // of the window's first row
  for (int64_t start = 0; start < tokens; start += kWindow) {
    const Listed listed = list_window(mask, start, tokens);
    const int32_t groups = (listed.count + kRowWarps - 1) / kRowWarps, items = groups * parts;
    for (; next < items; next += blocks) {
      const int32_t group = next / parts, first = group * kRowWarps;
      const int32_t count = min(listed.count - first, kRowWarps);
      put_rows(listed, first, count, start, rows);
      __syncthreads();
      call(rows, count, next - group * parts, place + first);
      __syncthreads();  // rows, and what the call has in shared memory, are written again
    }
    next -= items;
    place += groups * kRowWarps;
  }
}

// Which of the `busy` blocks with arithmetic this is, or -1 - n for the n-th of the others. Busy
// ones start first, since they take longest, but half a GPU of others comes behind the first of
// them: memory is at work from the start.
__device__ __forceinline__ int64_t block_role(int64_t block, int64_t busy, int64_t blocks) {
  constexpr int64_t kFirst = 128;  // about one for each SM of an H100
  const int64_t early = min(busy, kFirst), others = min(blocks - busy, kFirst);
  if (block < early) return block;
  if (block < early + others) return early - block - 1;
  return block < busy + others ? block - others : busy - block - 1;
}

// Rows that each warp of an other block looks after, at most 32.
constexpr int kCopyRows = 2, kZeroRows = 4, kIdleRows = 32;

inline int64_t other_blocks(int64_t tokens, int rows) {
  return (tokens + kRowWarps * rows - 1) / (kRowWarps * rows);
}

// call(row) for the rows outside the mask that this warp of the n-th other block looks after.
template <class Call>
__device__ __forceinline__ void each_other_row(const uint8_t *__restrict__ mask, int64_t tokens,
                                               int64_t n, int rows, Call call) {
  const int lane = threadIdx.x % 32;
  const int64_t first = (n * kRowWarps + threadIdx.x / 32) * rows, own = first + lane;
  const bool due = lane < rows && own < tokens && mask[own] == 0;
  for (uint32_t left = __ballot_sync(kWholeWarp, due); left != 0; left &= left - 1) {
    call(first + __ffs(left) - 1);
  }
}

}  // namespace mmadapt
