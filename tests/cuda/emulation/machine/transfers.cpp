// TMA loads and st.async, which land late; TMA stores, which read late.
#include <algorithm>

#include "state.h"

CUresult encode_tensor_map(CUtensorMap *map, CUtensorMapDataType, cuuint32_t dimensions, void *base,
                           const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                           const cuuint32_t *steps, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                           CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  *map = {static_cast<uint16_t *>(base), {1, 1, 1}, static_cast<int>(dimensions), int(box[1]), int(box[0])};
  const cuuint32_t row = swizzle == CU_TENSOR_MAP_SWIZZLE_128B ? 128 : 64;
  bool good = reinterpret_cast<uintptr_t>(base) % 16 == 0 && box[0] * 2 == row;
  for (cuuint32_t i = 0; i < dimensions; ++i) {
    map->sizes[i] = static_cast<int64_t>(sizes[i]);
    good = good && sizes[i] > 0 && box[i] >= 1 && box[i] <= 256 && steps[i] == 1;
  }
  cuuint64_t stride = 2;
  for (cuuint32_t i = 0; i + 1 < dimensions; ++i) {
    stride *= sizes[i];
    good = good && strides[i] == stride && stride % 16 == 0;  // other strides than these are not modelled
  }
  return good ? CUDA_SUCCESS : 1;
}

namespace machine {
namespace {

constexpr int kUnit = 8;  // numbers of 16 bytes, which the swizzle keeps together

int box_bytes(const CUtensorMap &map) { return map.box_rows * map.box_columns * 2; }

// call(address in the box, first number in the matrix's row, numbers that exist) for every unit of a box, whose rows
// from row c1 on may not exist.
template <class Call>
void each_unit(const CUtensorMap &map, uint32_t box, int c0, int c1, int64_t c2, Call call) {
  const int row_bytes = map.box_columns * 2;
  for (int r = 0; r < map.box_rows; ++r) {
    for (int unit = 0; unit < map.box_columns / kUnit; ++unit) {
      const int64_t row = int64_t(c1) + r, column = int64_t(c0) + unit * kUnit;
      const int64_t left = row < map.sizes[1] ? map.sizes[0] - column : 0;
      uint16_t *numbers = map.base + (c2 * map.sizes[1] + row) * map.sizes[0] + column;
      call(swizzled(box + r * row_bytes + unit * 16, row_bytes), numbers,
           static_cast<int>(std::clamp<int64_t>(left, 0, kUnit)));
    }
  }
}

}  // namespace

void store_async(uint32_t to, const void *data, int bytes, uint32_t barrier) {
  const auto block_of = [](uint32_t address) {
    return address >> kPeerShift ? static_cast<int>(address >> kPeerShift) - 1 : state.block();
  };
  const uint32_t local = (1u << kPeerShift) - 1;
  Transfer t = {block_of(to), to & local, barrier & local, bytes, {}, {}, 0, 0, 0};
  if (t.block != block_of(barrier)) fault("st.async: data and barrier are in different blocks");
  if (t.block >= state.cluster) fault("st.async to block %d of %d", t.block, state.cluster);
  if (to % bytes != 0) fault("misaligned st.async");
  std::memcpy(t.data, data, bytes);
  state.transfers.push_back(t);
}

void tma_load(uint32_t to, const CUtensorMap *map, uint32_t barrier, int c0, int c1, int c2) {
  if (to % 128 != 0) fault("TMA load to a misaligned address");
  if ((map->dimensions == 2) != (c2 < 0)) fault("TMA load with the wrong number of coordinates");
  const int bytes = box_bytes(*map);
  std::memset(place(state.block(), to, bytes), 0xFF, bytes);  // it may land from now on
  state.transfers.push_back({state.block(), to, barrier, bytes, {}, *map, c0, c1, std::max(c2, 0)});
  maybe_interrupt(0.3);
}

void land(const Transfer &t) {
  char *data = place(t.block, t.to, t.bytes);
  if (t.map.base == nullptr) {
    std::memcpy(data, t.data, t.bytes);
  } else {
    if (t.c2 >= t.map.sizes[2]) fault("TMA load of matrix %d of %ld", t.c2, long(t.map.sizes[2]));
    each_unit(t.map, t.to, t.c0, t.c1, t.c2, [&](uint32_t at, const uint16_t *numbers, int count) {
      uint16_t unit[kUnit] = {};  // what does not exist is zero
      if (count > 0) std::memcpy(unit, numbers, count * 2);
      std::memcpy(data + (at - t.to), unit, sizeof(unit));
    });
  }
  bytes_landed(t.block, t.barrier, t.bytes);
}

void tma_store(const CUtensorMap *map, uint32_t from, int c0, int c1) {
  if (state.fiber().unfenced) fault("TMA store without a proxy fence");
  state.fiber().stores.push_back({*map, from, c0, c1});
  maybe_interrupt(0.3);
}

void tma_commit() {
  Fiber &f = state.fiber();
  f.store_groups.push_back(std::move(f.stores));
  f.stores.clear();
}

void tma_wait_read(int left) {
  maybe_interrupt(0.3);
  Fiber &f = state.fiber();
  while (static_cast<int>(f.store_groups.size()) > left) read_store_group(f);
}

void read_store_group(Fiber &f) {
  for (const BulkStore &s : f.store_groups.front()) {
    const char *data = place(state.block_of(f), s.from, box_bytes(s.map));
    each_unit(s.map, s.from, s.c0, s.c1, 0, [&](uint32_t at, uint16_t *numbers, int count) {
      if (count > 0) std::memcpy(numbers, data + (at - s.from), count * 2);
    });
  }
  f.store_groups.pop_front();
}

}  // namespace machine
