// Backward and double backward of GELU on the CPU, in one vectorised pass each. The forward is torch's own.
// Formulas in metafast/ops/layers/README.md.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <tuple>

#include "cpu/isa/capability.h"
#include "cpu/output.h"

#define METAFAST_VARIANT "cpu/layers/gelu.inl"

namespace metafast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

template <typename T>
struct GeluRows {
  using Element = T;
  // by_x = grad f'(x).
  void (*backward)(int64_t n, const T* grad, const T* x, T* by_x);
  // by_grad = tangent f'(x), by_x = tangent grad f''(x).
  void (*double_backward)(int64_t n, const T* grad, const T* x, const T* tangent, T* by_grad, T* by_x);
};

#include "cpu/isa/per_type_and_isa.inl"

// Calls body(rows, begin, end) for parts of n elements, with the functions for their type.
template <typename Body>
void in_parts(const Tensor& x, Body body) {
  const auto run = [&](const auto& rows) {
    torch::stable::parallel_for(0, x.numel(), 1 << 13, [&](int64_t begin, int64_t end) { body(rows, begin, end); });
  };
  switch (x.scalar_type()) {
    case ScalarType::Float: return run(float32::widest_table());
    case ScalarType::Double: return run(float64::widest_table());
    default: throw std::runtime_error("metafast gelu (CPU): expected float32 or float64");
  }
}

template <typename T>
T* at(const Tensor& tensor, int64_t begin) {
  return static_cast<T*>(tensor.data_ptr()) + begin;
}

void gelu_backward_out(const Tensor& grad_, const Tensor& x_, const Tensor& by_x_) {
  const Tensor grad = torch::stable::contiguous(grad_), x = torch::stable::contiguous(x_);
  const Output by_x = contiguous_output(by_x_);
  in_parts(x, [&](const auto& rows, int64_t begin, int64_t end) {
    using T = typename std::decay_t<decltype(rows)>::Element;
    rows.backward(end - begin, at<const T>(grad, begin), at<const T>(x, begin), at<T>(by_x.tensor, begin));
  });
  by_x.give();
}

Tensor gelu_backward(const Tensor& grad, const Tensor& x_) {
  const Tensor x = torch::stable::contiguous(x_);
  Tensor by_x = torch::stable::empty_like(x);
  gelu_backward_out(grad, x, by_x);
  return by_x;
}

void gelu_double_backward_out(const Tensor& grad_, const Tensor& x_, const Tensor& tangent_, const Tensor& by_grad_, const Tensor& by_x_) {
  const Tensor grad = torch::stable::contiguous(grad_), x = torch::stable::contiguous(x_), tangent = torch::stable::contiguous(tangent_);
  const Output by_grad = contiguous_output(by_grad_), by_x = contiguous_output(by_x_);
  in_parts(x, [&](const auto& rows, int64_t begin, int64_t end) {
    using T = typename std::decay_t<decltype(rows)>::Element;
    rows.double_backward(end - begin, at<const T>(grad, begin), at<const T>(x, begin), at<const T>(tangent, begin),
                         at<T>(by_grad.tensor, begin), at<T>(by_x.tensor, begin));
  });
  for (const Output* output : {&by_grad, &by_x}) output->give();
}

std::tuple<Tensor, Tensor> gelu_double_backward(const Tensor& grad, const Tensor& x_, const Tensor& tangent) {
  const Tensor x = torch::stable::contiguous(x_);
  Tensor by_grad = torch::stable::empty_like(x), by_x = torch::stable::empty_like(x);
  gelu_double_backward_out(grad, x, tangent, by_grad, by_x);
  return {by_grad, by_x};
}

}  // namespace
}  // namespace metafast

STABLE_TORCH_LIBRARY_IMPL(metafast, CPU, library) {
  library.impl("gelu_backward", TORCH_BOX(&metafast::gelu_backward));
  library.impl("gelu_backward.out", TORCH_BOX(&metafast::gelu_backward_out));
  library.impl("gelu_double_backward", TORCH_BOX(&metafast::gelu_double_backward));
  library.impl("gelu_double_backward.out", TORCH_BOX(&metafast::gelu_double_backward_out));
}
