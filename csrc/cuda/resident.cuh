// How many clusters of a kernel run at once. Host code.
#pragma once

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <tuple>

namespace mmadapt {

// Sets `*count`, 0 where not even one fits, after telling the kernel that blocks may have `limit` bytes of
// shared memory; a launch then has `told`. `limit` is the same in all calls for a kernel: it holds for the
// kernel, and the last one told counts. Kept by device and launch shape, since asking takes longer than a
// launch.
inline cudaError_t resident_clusters(const void *kernel, int cluster, int threads, int shared,
                                     int limit, int *count) {
  static std::mutex mutex;
  static std::map<std::tuple<int, const void *, int, int, int>, int> known;
  int device;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const auto key = std::make_tuple(device, kernel, cluster, threads, shared);
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(key);
  if (found != known.end()) {
    *count = found->second;
    return cudaSuccess;
  }
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(cluster);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.attrs = &attribute;
  config.numAttrs = 1;
  error = cudaOccupancyMaxActiveClusters(count, kernel, &config);
  if (error != cudaSuccess) return error;
  known[key] = *count;
  return cudaSuccess;
}

}  // namespace mmadapt
