// GPU threads as fibers: each has a stack, and a switch saves what the x86-64 ABI wants saved.
#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>

#include "cuda_runtime.h"
#include "state.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

extern "C" void machine_switch(void **save, void *to);
asm(R"(
.text
.globl machine_switch
machine_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

namespace machine {

State state;

namespace {

constexpr size_t kStack = 32 * 1024;
constexpr int kSavedRegisters = 6;
void *schedule_stack;
bool in_fiber;

char *stacks() {
  static char *memory = static_cast<char *>(mmap(nullptr, kStack * kMostCluster * kMostThreads, PROT_READ | PROT_WRITE,
                                                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  return memory;
}

void begin() {
  (*state.thread)();
  const Fiber &f = state.fiber();
  if (!f.stores.empty() || !f.store_groups.empty()) {
    fault("a thread ends before its TMA stores have read their source");
  }
  wait_for(Waits::kEnded);
  std::abort();
}

}  // namespace

void make_fiber(int index) {
  void **top = reinterpret_cast<void **>(stacks() + kStack * (index + 1) - 64);
  *--top = nullptr;  // begin() does not return
  *--top = reinterpret_cast<void *>(&begin);
  for (int i = 0; i < kSavedRegisters; ++i) *--top = nullptr;
  Fiber &f = state.fibers[index];
  f = {};
  f.stack = top;
  for (long &phase : f.phase) phase = -2;
}

void resume(int index) {
  state.current = index;
  threadIdx.x = index % state.threads;
  blockIdx.x = state.blocks[index / state.threads].index;
  state.fiber().waits = Waits::kNothing;
  in_fiber = true;
  machine_switch(&schedule_stack, state.fiber().stack);
  in_fiber = false;
  if (state.failed) throw Fault();
}

void wait_for(Waits what) {
  Fiber &f = state.fiber();
  f.waits = what;
  machine_switch(&f.stack, schedule_stack);
}

void maybe_interrupt(double probability) {
  if (draw_unit() >= probability) return;
  state.interrupted = true;
  wait_for(Waits::kNothing);
}

void fault(const char *format, ...) {
  char text[2000];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  char where[100];
  snprintf(where, sizeof(where), " (block %d, warp %d, lane %d)", state.block(), state.current % state.threads / 32,
           lane());
  state.message = std::string(text) + where;
  state.failed = true;
  if (!in_fiber) throw Fault();
  wait_for(Waits::kEnded);
  std::abort();
}

int lane() { return state.current % 32; }
uint32_t block_in_cluster() { return state.block(); }

}  // namespace machine
