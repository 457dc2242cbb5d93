// rows = the positions t with mask[t], ascending; count = how many.
//
// One block walks the mask, 16 bytes per thread and step, and writes behind a running sum: a fixed
// order without a second kernel. 16384 tokens a step; a longer mask than that is rare.

#include "launch.cuh"
#include "mmadapt/masked_rows.h"

namespace mmadapt {
namespace {

constexpr int kThreads = 1024, kWarps = kThreads / 32, kBytes = 16;

__global__ void __launch_bounds__(kThreads)
    masked_rows_kernel(const uint8_t *__restrict__ mask, int32_t tokens, bool aligned,
                       int32_t *__restrict__ rows, int32_t *__restrict__ count) {
  __shared__ int32_t warp_sums[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int32_t before = 0;  // true entries of the steps behind us
  for (int64_t start = 0; start < tokens; start += kThreads * kBytes) {
    const int64_t first = start + threadIdx.x * kBytes;
    uint32_t set = 0;  // bit i: mask[first + i]
    if (aligned && first + kBytes <= tokens) {
      const uint4 bytes = *reinterpret_cast<const uint4 *>(mask + first);
      const uint32_t words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
#pragma unroll
      for (int i = 0; i < kBytes; ++i) {
        set |= static_cast<uint32_t>((words[i / 4] >> (8 * (i % 4)) & 0xff) != 0) << i;
      }
    } else {
      for (int i = 0; i < kBytes && first + i < tokens; ++i) {
        set |= static_cast<uint32_t>(mask[first + i] != 0) << i;
      }
    }
    // Inclusive sums over the warp, then over the warps.
    int32_t sum = __popc(set);
#pragma unroll
    for (int delta = 1; delta < 32; delta *= 2) {
      const int32_t left = __shfl_up_sync(0xffffffff, sum, delta);
      if (lane >= delta) sum += left;
    }
    if (lane == 31) warp_sums[warp] = sum;
    __syncthreads();
    int32_t at = before + sum - __popc(set);
    for (int w = 0; w < kWarps; ++w) {
      const int32_t other = warp_sums[w];
      at += w < warp ? other : 0;
      before += other;
    }
    for (; set != 0; set &= set - 1) rows[at++] = static_cast<int32_t>(first) + __ffs(set) - 1;
    __syncthreads();  // warp_sums are written again
  }
  if (threadIdx.x == 0) *count = before;
}

}  // namespace
}  // namespace mmadapt

extern "C" mmadapt_cuda_status mmadapt_masked_rows_cuda(const mmadapt_masked_rows *problem) {
  using namespace mmadapt;
  const mmadapt_masked_rows &p = *problem;
  if (p.tokens < 0 || p.tokens > INT32_MAX) return bad_argument("tokens: expected 0 to 2^31 - 1");
  const bool aligned = reinterpret_cast<uintptr_t>(p.mask) % kBytes == 0;
  return launch({"masked_rows_kernel", dim3(1), dim3(kThreads), 0, p.stream}, masked_rows_kernel,
                p.mask, static_cast<int32_t>(p.tokens), aligned, p.rows, p.count);
}
