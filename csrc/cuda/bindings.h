// From a launcher in plain C to a Python function.
//
//     define(m, "modality_gate_forward", &mmadapt_modality_gate_forward_cuda,
//            field("tokens", &Problem::tokens), ...);
//
// The Python function takes the struct's members by position, in that order, or by name: addresses
// and streams as integers. What fails becomes an exception with all of them.
#pragma once

#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "mmadapt/cuda.h"

namespace mmadapt {

template <class Problem, class Member>
struct Field {
  using Type = Member;
  const char *name;
  Member Problem::*member;
  Member &of(Problem &problem) const { return problem.*member; }
};

template <class Problem, class Member>
Field<Problem, Member> field(const char *name, Member Problem::*member) {
  return {name, member};
}

// A member of a struct inside the problem.
template <class Problem, class Inner, class Member>
struct NestedField {
  using Type = Member;
  const char *name;
  Inner Problem::*inner;
  Member Inner::*member;
  Member &of(Problem &problem) const { return problem.*inner.*member; }
};

template <class Problem, class Inner, class Member>
NestedField<Problem, Inner, Member> nested(const char *name, Inner Problem::*inner,
                                           Member Inner::*member) {
  return {name, inner, member};
}

// Type in Python of a member.
template <class Member>
using Passed = std::conditional_t<std::is_pointer_v<Member>, uintptr_t, Member>;

template <class Member>
Member from_python(Passed<Member> value) {
  if constexpr (std::is_pointer_v<Member>) {
    return reinterpret_cast<Member>(value);
  } else {
    return value;
  }
}

template <class Member>
void describe(std::ostringstream &out, const char *name, Member value) {
  out << (out.tellp() > 0 ? ", " : "") << name << "=";
  if constexpr (std::is_pointer_v<Member>) {
    out << "0x" << std::hex << reinterpret_cast<uintptr_t>(value) << std::dec;
  } else {
    out << value;
  }
}

// `function`: as Python calls it. `arguments`: names and values.
[[noreturn]] inline void raise(const char *function, const mmadapt_cuda_status &status,
                               const std::string &arguments) {
  std::ostringstream out;
  out << "mmadapt._C.cuda." << function << ": ";
  if (status.status != MMADAPT_CUDA_ERROR) {
    out << status.kernel << "; called with " << arguments;
    throw pybind11::value_error(out.str());
  }
  const auto error = static_cast<cudaError_t>(status.error);
  out << "CUDA error " << status.error << " (" << cudaGetErrorName(error)
      << "): " << cudaGetErrorString(error);
  out << (status.earlier ? "; it was pending before the launch of " : "; at the launch of ");
  out << status.kernel << " with " << arguments;
  throw std::runtime_error(out.str());
}

template <class Problem, class... Fields>
void define(pybind11::module_ &m, const char *name,
            mmadapt_cuda_status (*launcher)(const Problem *), Fields... fields) {
  m.def(
      name,
      [=](Passed<typename Fields::Type>... values) {
        Problem problem = {};
        ((fields.of(problem) = from_python<typename Fields::Type>(values)), ...);
        mmadapt_cuda_status status;
        {
          pybind11::gil_scoped_release release;
          status = launcher(&problem);
        }
        if (status.status != MMADAPT_OK) {
          std::ostringstream arguments;
          (describe(arguments, fields.name, fields.of(problem)), ...);
          raise(name, status, arguments.str());
        }
      },
      pybind11::arg(fields.name)...);
}

// One element of a member that is an array.
template <class Problem, class Member, size_t N>
struct ElementField {
  using Type = Member;
  const char *name;
  Member (Problem::*member)[N];
  size_t index;
  Member &of(Problem &problem) const { return (problem.*member)[index]; }
};

template <class Problem, class Member, size_t N>
ElementField<Problem, Member, N> element(const char *name, Member (Problem::*member)[N], size_t index) {
  return {name, member, index};
}

}  // namespace mmadapt
