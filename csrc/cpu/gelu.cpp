// The double backward of GELU on the CPU, in one pass; torch composes it of a dozen. Forward and backward are torch's own.
// Formulas in metafast/ops/gelu/README.md.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <tuple>

#include "cpu/capability.h"

#define METAFAST_VARIANT "cpu/gelu.inl"

namespace metafast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

template <typename T>
struct GeluRows {
  // by_grad = tangent f'(x), by_x = tangent grad f''(x).
  void (*double_backward)(int64_t n, const T* grad, const T* x, const T* tangent, T* by_grad, T* by_x);
};

#include "cpu/both_types.inl"

template <typename T>
void run(const GeluRows<T>& rows, const Tensor& grad, const Tensor& x, const Tensor& tangent, Tensor& by_grad, Tensor& by_x) {
  const auto read = [](const Tensor& tensor) { return static_cast<const T*>(tensor.data_ptr()); };
  const auto write = [](Tensor& tensor) { return static_cast<T*>(tensor.data_ptr()); };
  const T *g = read(grad), *in = read(x), *t = read(tangent);
  T *to_grad = write(by_grad), *to_x = write(by_x);
  torch::stable::parallel_for(0, x.numel(), 1 << 13, [&](int64_t begin, int64_t end) {
    rows.double_backward(end - begin, g + begin, in + begin, t + begin, to_grad + begin, to_x + begin);
  });
}

std::tuple<Tensor, Tensor> gelu_double_backward(const Tensor& grad_, const Tensor& x_, const Tensor& tangent_) {
  const Tensor grad = torch::stable::contiguous(grad_), x = torch::stable::contiguous(x_), tangent = torch::stable::contiguous(tangent_);
  Tensor by_grad = torch::stable::empty_like(x), by_x = torch::stable::empty_like(x);
  switch (x.scalar_type()) {
    case ScalarType::Float: run(single::widest_table(), grad, x, tangent, by_grad, by_x); break;
    case ScalarType::Double: run(precise::widest_table(), grad, x, tangent, by_grad, by_x); break;
    default: throw std::runtime_error("metafast gelu (CPU): expected float32 or float64");
  }
  return {by_grad, by_x};
}

}  // namespace
}  // namespace metafast

STABLE_TORCH_LIBRARY_IMPL(metafast, CPU, library) {
  library.impl("gelu_double_backward", TORCH_BOX(&metafast::gelu_double_backward));
}
