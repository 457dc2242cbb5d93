// For choices that are made by shape alone, so that sums have the same order on every machine.
#pragma once

namespace mmadapt::hopper {

constexpr int kMultiprocessors = 132;  // of an H100 SXM or H200

}  // namespace mmadapt::hopper
