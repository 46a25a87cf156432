// Layer normalisation with weights of each task's own on the CPU: forward, backward, and the tangent of the backward, which is
// its double backward. Formulas in metafast/ops/layers/README.md.
//
// Shapes: input and what is shaped like it [T, R, C], weight and bias [T, C], statistics [T, R, 2] (mean, 1 / standard deviation).

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "cpu/isa/capability.h"
#include "cpu/output.h"

#define METAFAST_VARIANT "cpu/layers/layer_norm.inl"

namespace metafast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

// One row each. What belongs to a weight is added to.
template <typename T>
struct LayerNormRows {
  using Element = T;
  void (*forward)(int64_t n, const T* x, const T* weight, const T* bias, T eps, T* out, T* statistics);
  void (*backward)(int64_t n, const T* grad, const T* x, const T* weight, const T* statistics, T* grad_x, T* grad_weight, T* grad_bias);
  void (*backward_jvp)(int64_t n, const T* grad, const T* x, const T* weight, const T* statistics, const T* tangent_x,
                       const T* tangent_weight, const T* tangent_bias, T* tangent_out, T* tangent_grad_x, T* tangent_grad_weight);
};

#include "cpu/isa/per_type_and_isa.inl"

template <typename Body>
void with_rows(const Tensor& tensor, Body body) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return body(float32::widest_table());
    case ScalarType::Double: return body(float64::widest_table());
    default: throw std::runtime_error("metafast layer_norm (CPU): expected float32 or float64");
  }
}

// Contiguous data, a pointer to row i of n elements.
template <typename T>
struct Rows {
  Rows(const Tensor& tensor) : data(static_cast<T*>(tensor.data_ptr())), n(tensor.size(tensor.dim() - 1)) {}
  T* at(int64_t i) const { return data + i * n; }
  T* data;
  int64_t n;
};

// Calls body(task, row) for the rows of all tasks.
template <typename Body>
void for_each_row(const Tensor& input, Body body) {
  const int64_t rows = input.size(1), grain = std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(input.size(2), 1));
  torch::stable::parallel_for(0, input.size(0) * rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i / rows, i);
  });
}

// Calls body(task, row, sums) for the rows of all tasks and writes, for each of the outputs [T, C], the task's sums: sums holds one
// after the other. Rows are added in chunks whose borders depend on the shape alone, and the chunks in their order.
template <typename T, typename Body>
void for_each_row_summing(const Tensor& input, const std::vector<Rows<T>>& outputs, Body body) {
  constexpr int64_t rows_of_chunk = 128;
  const int64_t tasks = input.size(0), rows = input.size(1), n = input.size(2), size = n * int64_t(outputs.size());
  const int64_t chunks = std::max<int64_t>(1, (rows + rows_of_chunk - 1) / rows_of_chunk);
  std::vector<T> sums(size_t(tasks * chunks * size));
  torch::stable::parallel_for(0, tasks * chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t task = i / chunks, first = i % chunks * rows_of_chunk;
      for (int64_t row = first; row < std::min(rows, first + rows_of_chunk); ++row) body(task, task * rows + row, sums.data() + i * size);
    }
  });
  for (int64_t task = 0; task < tasks; ++task) {
    for (size_t k = 0; k < outputs.size(); ++k) {
      T* to = outputs[k].at(task);
      std::fill(to, to + n, T(0));
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const T* from = sums.data() + (task * chunks + chunk) * size + int64_t(k) * n;
        for (int64_t j = 0; j < n; ++j) to[j] += from[j];
      }
    }
  }
}

void layer_norm_forward_out(const Tensor& input_, const Tensor& weight_, const Tensor& bias_, double eps, const Tensor& out_, const Tensor& statistics_) {
  const Tensor input = torch::stable::contiguous(input_), weight = torch::stable::contiguous(weight_), bias = torch::stable::contiguous(bias_);
  const Output out = contiguous_output(out_), statistics = contiguous_output(statistics_);
  with_rows(input, [&](const auto& rows) {
    using T = typename std::decay_t<decltype(rows)>::Element;
    const Rows<const T> x(input), w(weight), b(bias);
    const Rows<T> y(out.tensor), s(statistics.tensor);
    for_each_row(input, [&](int64_t task, int64_t i) { rows.forward(x.n, x.at(i), w.at(task), b.at(task), T(eps), y.at(i), s.at(i)); });
  });
  for (const Output* output : {&out, &statistics}) output->give();
}

std::tuple<Tensor, Tensor> layer_norm_forward(const Tensor& input_, const Tensor& weight, const Tensor& bias, double eps) {
  const Tensor input = torch::stable::contiguous(input_);
  Tensor out = torch::stable::empty_like(input);
  Tensor statistics = torch::stable::new_empty(input, std::vector<int64_t>{input.size(0), input.size(1), 2});
  layer_norm_forward_out(input, weight, bias, eps, out, statistics);
  return {out, statistics};
}

void layer_norm_backward_out(const Tensor& grad_, const Tensor& input_, const Tensor& weight_, const Tensor& statistics_, const Tensor& grad_input_,
                             const Tensor& grad_weight_, const Tensor& grad_bias_) {
  const Tensor grad = torch::stable::contiguous(grad_), input = torch::stable::contiguous(input_);
  const Tensor weight = torch::stable::contiguous(weight_), statistics = torch::stable::contiguous(statistics_);
  const Output grad_input = contiguous_output(grad_input_), grad_weight = contiguous_output(grad_weight_), grad_bias = contiguous_output(grad_bias_);
  with_rows(input, [&](const auto& rows) {
    using T = typename std::decay_t<decltype(rows)>::Element;
    const Rows<const T> g(grad), x(input), w(weight), s(statistics);
    const Rows<T> dx(grad_input.tensor);
    for_each_row_summing<T>(input, {Rows<T>(grad_weight.tensor), Rows<T>(grad_bias.tensor)}, [&](int64_t task, int64_t i, T* sums) {
      rows.backward(x.n, g.at(i), x.at(i), w.at(task), s.at(i), dx.at(i), sums, sums + x.n);
    });
  });
  for (const Output* output : {&grad_input, &grad_weight, &grad_bias}) output->give();
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& grad, const Tensor& input_, const Tensor& weight_, const Tensor& statistics) {
  const Tensor input = torch::stable::contiguous(input_), weight = torch::stable::contiguous(weight_);
  Tensor grad_input = torch::stable::empty_like(input), grad_weight = torch::stable::empty_like(weight), grad_bias = torch::stable::empty_like(weight);
  layer_norm_backward_out(grad, input, weight, statistics, grad_input, grad_weight, grad_bias);
  return {grad_input, grad_weight, grad_bias};
}

void layer_norm_backward_jvp_out(
    const Tensor& grad_, const Tensor& input_, const Tensor& weight_, const Tensor& statistics_, const Tensor& tangent_input_,
    const Tensor& tangent_weight_, const Tensor& tangent_bias_, const Tensor& tangent_out_, const Tensor& tangent_grad_input_,
    const Tensor& tangent_grad_weight_) {
  const Tensor grad = torch::stable::contiguous(grad_), input = torch::stable::contiguous(input_);
  const Tensor weight = torch::stable::contiguous(weight_), statistics = torch::stable::contiguous(statistics_);
  const Tensor tangent_input = torch::stable::contiguous(tangent_input_);
  const Tensor tangent_weight = torch::stable::contiguous(tangent_weight_), tangent_bias = torch::stable::contiguous(tangent_bias_);
  const Output tangent_out = contiguous_output(tangent_out_), tangent_grad_input = contiguous_output(tangent_grad_input_);
  const Output tangent_grad_weight = contiguous_output(tangent_grad_weight_);
  with_rows(input, [&](const auto& rows) {
    using T = typename std::decay_t<decltype(rows)>::Element;
    const Rows<const T> g(grad), x(input), w(weight), s(statistics), a(tangent_input), p(tangent_weight), q(tangent_bias);
    const Rows<T> ty(tangent_out.tensor), tdx(tangent_grad_input.tensor);
    for_each_row_summing<T>(input, {Rows<T>(tangent_grad_weight.tensor)}, [&](int64_t task, int64_t i, T* sums) {
      rows.backward_jvp(x.n, g.at(i), x.at(i), w.at(task), s.at(i), a.at(i), p.at(task), q.at(task), ty.at(i), tdx.at(i), sums);
    });
  });
  for (const Output* output : {&tangent_out, &tangent_grad_input, &tangent_grad_weight}) output->give();
}

// (tangent_out, tangent_grad_input, tangent_grad_weight)
std::tuple<Tensor, Tensor, Tensor> layer_norm_backward_jvp(
    const Tensor& grad, const Tensor& input_, const Tensor& weight_, const Tensor& statistics, const Tensor& tangent_input,
    const Tensor& tangent_weight, const Tensor& tangent_bias) {
  const Tensor input = torch::stable::contiguous(input_), weight = torch::stable::contiguous(weight_);
  Tensor tangent_out = torch::stable::empty_like(input), tangent_grad_input = torch::stable::empty_like(input);
  Tensor tangent_grad_weight = torch::stable::empty_like(weight);
  layer_norm_backward_jvp_out(grad, input, weight, statistics, tangent_input, tangent_weight, tangent_bias, tangent_out, tangent_grad_input,
                              tangent_grad_weight);
  return {tangent_out, tangent_grad_input, tangent_grad_weight};
}

}  // namespace
}  // namespace metafast

STABLE_TORCH_LIBRARY_IMPL(metafast, CPU, library) {
  library.impl("layer_norm_forward", TORCH_BOX(&metafast::layer_norm_forward));
  library.impl("layer_norm_forward.out", TORCH_BOX(&metafast::layer_norm_forward_out));
  library.impl("layer_norm_backward", TORCH_BOX(&metafast::layer_norm_backward));
  library.impl("layer_norm_backward.out", TORCH_BOX(&metafast::layer_norm_backward_out));
  library.impl("layer_norm_backward_jvp", TORCH_BOX(&metafast::layer_norm_backward_jvp));
  library.impl("layer_norm_backward_jvp.out", TORCH_BOX(&metafast::layer_norm_backward_jvp_out));
}
