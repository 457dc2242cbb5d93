// Shared memory, and the draws of the schedule.
#include "state.h"

namespace machine {
namespace {

uint64_t drawn = 1;

}  // namespace

void seed(uint64_t value) {
  drawn = value * 0x9E3779B97F4A7C15u + 88172645463325252u;
  for (int i = 0; i < 10; ++i) draw();
}

uint64_t draw() {  // xorshift64*
  drawn ^= drawn << 13;
  drawn ^= drawn >> 7;
  drawn ^= drawn << 17;
  return drawn * 2685821657736338717u >> 11;
}

double draw_unit() { return (draw() & 0xFFFFF) / double(0x100000); }

char *place(int block, uint32_t address, int bytes) {
  Block &b = state.blocks[block];
  if (address < kWindow || address + bytes > kWindow + state.shared_bytes || address + bytes > b.first_barrier) {
    fault("%d bytes at %u are outside of the data in shared memory", bytes, address);
  }
  return b.memory.data() + (address - kWindow);
}

char *shared(uint32_t address, int bytes) {
  maybe_interrupt(0.003);
  if (address % bytes != 0) fault("misaligned access to shared memory, %d bytes at %u", bytes, address);
  return place(state.block(), address, bytes);
}

uint32_t swizzled(uint32_t address, int row_bytes) {
  const uint32_t row = row_bytes == 128 ? address >> 7 & 7 : address >> 7 & 3;
  return address ^ row << 4;
}

}  // namespace machine
