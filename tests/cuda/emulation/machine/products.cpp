// wgmma: a warp's 16 rows of D += A B, computed when its group is waited for or earlier.
#include <immintrin.h>

#include "state.h"

namespace machine {
namespace {

constexpr int kRows = 16, kDepth = 16, kMostColumns = 128;

float number(uint16_t bits, bool fp16) {
  if (fp16) return _cvtsh_ss(bits);
  const uint32_t wide = uint32_t(bits) << 16;
  float v;
  std::memcpy(&v, &wide, sizeof(v));
  return v;
}

// The lane that holds entry (row, column) of a fragment.
int lane_of(int row, int column) { return row % 8 * 4 + column % 8 / 2; }

uint32_t first_byte(uint32_t descriptor) { return (descriptor & 0x3FFF) << 4; }

struct Operands {
  float a[kRows][kDepth], b[kDepth][kMostColumns];
};

float shared_number(int block, uint32_t address, int row_bytes, bool fp16) {
  uint16_t bits;
  std::memcpy(&bits, place(block, swizzled(address, row_bytes), 2), 2);
  return number(bits, fp16);
}

void read_a(Operands &o, const WarpProduct &product, int block, int warp) {
  const Product &p = product.lanes[0];
  for (int r = 0; r < kRows; ++r) {
    for (int k = 0; k < kDepth; ++k) {
      if (p.has_registers) {
        const uint32_t pair = product.lanes[lane_of(r, k)].registers[k / 8 * 2 + r / 8];
        o.a[r][k] = number(k % 2 ? pair >> 16 : pair & 0xFFFF, p.fp16);
      } else {
        const int row = warp % 4 * kRows + r;
        o.a[r][k] = shared_number(block, first_byte(p.a) + row * 128 + k * 2, 128, p.fp16);
      }
    }
  }
}

// Rows of N numbers if transposed, else of K numbers; every eight rows lie `stride` bytes behind the eight before.
void read_b(Operands &o, const Product &p, int block) {
  const int row_bytes = p.b_high >> 30 == 1 ? 128 : 64;
  const uint32_t first = first_byte(p.b), stride = first_byte(p.b_high);
  if ((p.b >> 16 & 0x3FFF) != 1) fault("wgmma: the leading offset is not 16 bytes");
  if (p.transposed && p.n * 2 + static_cast<int>(first % row_bytes) > row_bytes) {
    fault("wgmma: a transposed operand is wider than its rows");
  }
  for (int k = 0; k < kDepth; ++k) {
    for (int n = 0; n < p.n; ++n) {
      const int row = p.transposed ? k : n, column = p.transposed ? n : k;
      o.b[k][n] = shared_number(block, first + row / 8 * stride + row % 8 * row_bytes + column * 2, row_bytes, p.fp16);
    }
  }
}

void multiply(int index, const WarpProduct &product) {
  static Operands o;
  const Product &p = product.lanes[0];
  const int block = index / state.warps;
  state.current = index * 32;
  read_a(o, product, block, index % state.warps);
  read_b(o, p, block);
  for (int r = 0; r < kRows; ++r) {
    float sums[kMostColumns] = {};
    for (int k = 0; k < kDepth; ++k) {
      for (int n = 0; n < p.n; ++n) sums[n] += o.a[r][k] * o.b[k][n];
    }
    for (int n = 0; n < p.n; ++n) product.lanes[lane_of(r, n)].d[n / 8 * 4 + r / 8 * 2 + n % 2] += sums[n];
  }
}

}  // namespace

void product(const Product &p) {
  Slot slot = {};
  static_assert(sizeof(p) <= sizeof(slot));
  std::memcpy(&slot, &p, sizeof(p));
  together(Together::kProduct, 0, slot);
}

void product_commit() { together(Together::kCommit, 0, {}); }
void product_wait(int left) { together(Together::kWait, left, {}); }

void run_product_group(int warp) {
  Warp &w = state.of_warps[warp];
  for (const WarpProduct &product : w.product_groups.front()) multiply(warp, product);
  w.product_groups.pop_front();
}

}  // namespace machine
