// Launches, and what the test calls.
#include "cuda_runtime.h"
#include "state.h"

namespace mmadapt::swiglu {
uint8_t memory[1];  // the kernel's `extern __shared__`, of which only the name is used
}

namespace machine {
namespace {

// Threads that need nobody: one after another, on the stack of the caller.
void run_alone(unsigned blocks, unsigned threads, const std::function<void()> &thread) {
  for (unsigned b = 0; b < blocks; ++b) {
    for (unsigned t = 0; t < threads; ++t) {
      blockIdx = dim3(b);
      threadIdx = dim3(t);
      thread();
    }
  }
}

void begin_cluster(unsigned first_block) {
  state.blocks.assign(state.cluster, Block());
  for (int b = 0; b < state.cluster; ++b) {
    state.blocks[b].memory.assign(state.shared_bytes, '\xFF');
    state.blocks[b].index = first_block + b;
  }
  state.of_warps.assign(state.cluster * state.warps, Warp());
  state.fibers.resize(state.cluster * state.threads);
  for (size_t i = 0; i < state.fibers.size(); ++i) make_fiber(static_cast<int>(i));
  state.transfers.clear();
  state.cluster_arrived = state.cluster_phase = 0;
  state.changes = 0;
  state.interrupted = state.failed = false;
}

}  // namespace

bool run(unsigned blocks, unsigned threads, size_t shared_bytes, unsigned cluster,
         const std::function<void()> &thread) {
  gridDim = dim3(blocks);
  blockDim = dim3(threads);
  threadIdx = blockIdx = dim3(0, 0, 0);
  if (cluster == 0) {
    run_alone(blocks, threads, thread);
    return true;
  }
  state.cluster = static_cast<int>(cluster);
  state.threads = static_cast<int>(threads);
  state.warps = state.threads / 32;
  state.shared_bytes = shared_bytes;
  state.thread = &thread;
  state.message.clear();
  try {
    for (unsigned first = 0; first < blocks; first += cluster) {
      begin_cluster(first);
      run_cluster();
    }
  } catch (const Fault &) {
    return false;
  }
  return true;
}

}  // namespace machine

int machine_planted = 0;
extern "C" void machine_seed(uint64_t value) { machine::seed(value); }
extern "C" const char *machine_message() { return machine::state.message.c_str(); }
