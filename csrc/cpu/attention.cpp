// The four passes of attention on the CPU, by row panels: the double backward needs 12 matrix products. Formulas and names are
// in metafast/ops/attention/README.md.

#include "attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <stdexcept>

#include "cpu/attention_panels.h"

namespace metafast {
namespace {

using torch::headeronly::ScalarType;

template <typename T>
void forward(const Problem<T>& problem, Matrices<T> out, T* lse) {
  for_each_panel(problem, 1, [&](const Panel& panel, const Buffers<T>& scratch) {
    T *p = scratch[0], *statistic = statistic_at(problem, lse, panel);
    if (panel.columns() == 0) {
      zero_rows(rows_of(out, panel), panel.count, problem.value_depth);
      std::fill(statistic + panel.first, statistic + panel.first + panel.count, -std::numeric_limits<T>::infinity());
      return;
    }
    scores(problem, panel, p, scratch.stride);
    for (int64_t i = 0; i < panel.count; ++i) {
      const int64_t n = row_columns(problem, panel, i);
      statistic[panel.first + i] = attention_rows<T>().softmax(n, p + i * scratch.stride);
      std::fill(p + i * scratch.stride + n, p + i * scratch.stride + panel.columns(), T(0));
    }
    to_rows(panel, problem.value_depth, T(1), p, scratch.stride, keys_of(problem.v, panel, problem.group()), T(0), rows_of(out, panel));
  });
}

template <typename T>
void backward(const Problem<T>& problem, const T* lse, Matrices<const T> grad_out, Matrices<T> grad_query, const KeySums<T>& grads) {
  const int64_t group = problem.group();
  for_each_panel_summing(problem, grads, 2, [&](const Panel& panel, const Buffers<T>& scratch, Operand<T> grad_key, Operand<T> grad_value) {
    if (panel.columns() == 0) return zero_rows(rows_of(grad_query, panel), panel.count, problem.depth);
    const int64_t stride = scratch.stride, d = problem.depth, dv = problem.value_depth;
    const auto g = rows_of(grad_out, panel);
    T *p = scratch[0], *e = scratch[1];
    probabilities(problem, panel, statistic_at(problem, lse, panel), p, stride);
    outer(panel, dv, T(1), g, keys_of(problem.v, panel, group), T(0), e, stride);
    to_keys(panel, dv, T(1), p, stride, g, grad_value);
    for (int64_t i = 0; i < panel.count; ++i) attention_rows<T>().softmax_jacobian(panel.columns(), p + i * stride, e + i * stride);
    to_rows(panel, d, problem.scale, e, stride, keys_of(problem.k, panel, group), T(0), rows_of(grad_query, panel));
    to_keys(panel, d, problem.scale, e, stride, rows_of(problem.q, panel), grad_key);
  });
}

// The directions of a derivative, shaped like query, key and value.
template <typename T>
struct Tangents {
  Matrices<const T> q, k, v;
};

// scale (tq k^T + q tk^T)
template <typename T>
void tangent_scores(const Problem<T>& problem, const Tangents<T>& tangent, const Panel& panel, T* t, int64_t stride) {
  outer(panel, problem.depth, problem.scale, rows_of(tangent.q, panel), keys_of(problem.k, panel, problem.group()), T(0), t, stride);
  outer(panel, problem.depth, problem.scale, rows_of(problem.q, panel), keys_of(tangent.k, panel, problem.group()), T(1), t, stride);
}

template <typename T>
void jvp(const Problem<T>& problem, const T* lse, const Tangents<T>& tangent, Matrices<T> tangent_out) {
  const int64_t group = problem.group();
  for_each_panel(problem, 2, [&](const Panel& panel, const Buffers<T>& scratch) {
    if (panel.columns() == 0) return zero_rows(rows_of(tangent_out, panel), panel.count, problem.value_depth);
    const int64_t stride = scratch.stride, dv = problem.value_depth;
    T *p = scratch[0], *t = scratch[1];
    probabilities(problem, panel, statistic_at(problem, lse, panel), p, stride);
    tangent_scores(problem, tangent, panel, t, stride);
    for (int64_t i = 0; i < panel.count; ++i) attention_rows<T>().softmax_jacobian(panel.columns(), p + i * stride, t + i * stride);
    to_rows(panel, dv, T(1), t, stride, keys_of(problem.v, panel, group), T(0), rows_of(tangent_out, panel));
    to_rows(panel, dv, T(1), p, stride, keys_of(tangent.v, panel, group), T(1), rows_of(tangent_out, panel));
  });
}

template <typename T>
void backward_jvp(const Problem<T>& problem, const T* lse, Matrices<const T> grad_out, const Tangents<T>& tangent,
                  const std::optional<Matrices<const T>>& tangent_grad_out, Matrices<T> tangent_out,
                  Matrices<T> tangent_grad_query, const KeySums<T>& tangent_grads) {
  const int64_t group = problem.group();
  for_each_panel_summing(problem, tangent_grads, 4, [&](const Panel& panel, const Buffers<T>& scratch, Operand<T> key_sum, Operand<T> value_sum) {
    if (panel.columns() == 0) {
      zero_rows(rows_of(tangent_out, panel), panel.count, problem.value_depth);
      zero_rows(rows_of(tangent_grad_query, panel), panel.count, problem.depth);
      return;
    }
    const int64_t stride = scratch.stride, d = problem.depth, dv = problem.value_depth;
    const auto k = keys_of(problem.k, panel, group), v = keys_of(problem.v, panel, group);
    const auto g = rows_of(grad_out, panel);
    T *p = scratch[0], *t = scratch[1], *e = scratch[2], *f = scratch[3];
    probabilities(problem, panel, statistic_at(problem, lse, panel), p, stride);
    tangent_scores(problem, tangent, panel, t, stride);
    outer(panel, dv, T(1), g, v, T(0), e, stride);
    outer(panel, dv, T(1), g, keys_of(tangent.v, panel, group), T(0), f, stride);
    if (tangent_grad_out) {
      const auto tangent_g = rows_of(*tangent_grad_out, panel);
      outer(panel, dv, T(1), tangent_g, v, T(1), f, stride);
      to_keys(panel, dv, T(1), p, stride, tangent_g, value_sum);
    }
    for (int64_t i = 0; i < panel.count; ++i) {
      attention_rows<T>().backward_jvp(panel.columns(), p + i * stride, t + i * stride, e + i * stride, f + i * stride);
    }
    to_rows(panel, dv, T(1), t, stride, v, T(0), rows_of(tangent_out, panel));
    to_rows(panel, dv, T(1), p, stride, keys_of(tangent.v, panel, group), T(1), rows_of(tangent_out, panel));
    to_rows(panel, d, problem.scale, f, stride, k, T(0), rows_of(tangent_grad_query, panel));
    to_rows(panel, d, problem.scale, e, stride, keys_of(tangent.k, panel, group), T(1), rows_of(tangent_grad_query, panel));
    to_keys(panel, d, problem.scale, f, stride, rows_of(problem.q, panel), key_sum);
    to_keys(panel, d, problem.scale, e, stride, rows_of(tangent.q, panel), key_sum);
    to_keys(panel, dv, T(1), t, stride, g, value_sum);
  });
}

// Calls body with a value of the element type; the dispatcher's caller has checked that it is one of these.
template <typename Body>
void with_element_type(const Tensor& tensor, Body body) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return body(float());
    case ScalarType::Double: return body(double());
    default: throw std::runtime_error("metafast attention (CPU): expected float32 or float64");
  }
}

// The matrix products want rows that are contiguous and do not overlap (an expanded dimension has stride 0).
bool has_plain_rows(const Tensor& tensor) {
  const int64_t rank = tensor.dim(), columns = tensor.size(rank - 1);
  return (columns == 1 || tensor.stride(rank - 1) == 1) &&
      (tensor.size(rank - 2) == 1 || tensor.stride(rank - 2) >= columns);
}

Tensor plain_rows(const Tensor& tensor) {
  return has_plain_rows(tensor) ? tensor : torch::stable::contiguous(tensor);
}

// An output [*lead, heads, rows, columns] beside an input: in the input's memory order where the shapes agree, as models
// hand over transposed views and take them back.
Tensor output_like(const Tensor& input, int64_t columns) {
  if (input.size(input.dim() - 1) == columns) {
    Tensor output = torch::stable::empty_like(input);
    if (has_plain_rows(output)) return output;
  }
  std::vector<int64_t> sizes(input.sizes().begin(), input.sizes().end());
  sizes.back() = columns;
  return torch::stable::new_empty(input, sizes);
}

Tensor output_like(const Tensor& input) { return output_like(input, input.size(input.dim() - 1)); }

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.data_ptr());
}

}  // namespace

std::tuple<Tensor, Tensor> attention_forward(
    const Tensor& query_, const Tensor& key_, const Tensor& value_, const std::optional<Tensor>& attn_mask,
    bool is_causal, double scale) {
  const Tensor query = plain_rows(query_), key = plain_rows(key_), value = plain_rows(value_);
  Tensor out = output_like(query, value.size(value.dim() - 1));
  Tensor lse = torch::stable::new_empty(query, std::vector<int64_t>(query.sizes().begin(), query.sizes().end() - 1));
  with_element_type(query, [&](auto zero) {
    using T = decltype(zero);
    forward(Problem<T>(query, key, value, attn_mask, is_causal, scale), Matrices<T>(out), static_cast<T*>(lse.data_ptr()));
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad_out_, const Tensor& query_, const Tensor& key_, const Tensor& value_, const Tensor&,
    const Tensor& lse_, const std::optional<Tensor>& attn_mask, bool is_causal, double scale) {
  const Tensor query = plain_rows(query_), key = plain_rows(key_), value = plain_rows(value_), grad_out = plain_rows(grad_out_);
  const Tensor lse = torch::stable::contiguous(lse_);
  Tensor grad_query = output_like(query), grad_key = output_like(key), grad_value = output_like(value);
  with_element_type(query, [&](auto zero) {
    using T = decltype(zero);
    backward(Problem<T>(query, key, value, attn_mask, is_causal, scale), data<T>(lse), Matrices<const T>(grad_out),
             Matrices<T>(grad_query), KeySums<T>{Matrices<T>(grad_key), Matrices<T>(grad_value)});
  });
  return {grad_query, grad_key, grad_value};
}

Tensor attention_jvp(
    const Tensor& query_, const Tensor& key_, const Tensor& value_, const Tensor& out, const Tensor& lse_,
    const Tensor& tangent_query_, const Tensor& tangent_key_, const Tensor& tangent_value_,
    const std::optional<Tensor>& attn_mask, bool is_causal, double scale) {
  const Tensor query = plain_rows(query_), key = plain_rows(key_), value = plain_rows(value_);
  const Tensor tangent_query = plain_rows(tangent_query_), tangent_key = plain_rows(tangent_key_);
  const Tensor tangent_value = plain_rows(tangent_value_), lse = torch::stable::contiguous(lse_);
  Tensor tangent_out = output_like(out);
  with_element_type(query, [&](auto zero) {
    using T = decltype(zero);
    using M = Matrices<const T>;
    jvp(Problem<T>(query, key, value, attn_mask, is_causal, scale), data<T>(lse),
        Tangents<T>{M(tangent_query), M(tangent_key), M(tangent_value)}, Matrices<T>(tangent_out));
  });
  return tangent_out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward_jvp(
    const Tensor& grad_out_, const Tensor& query_, const Tensor& key_, const Tensor& value_, const Tensor& out,
    const Tensor& lse_, const Tensor& tangent_query_, const Tensor& tangent_key_, const Tensor& tangent_value_,
    const std::optional<Tensor>& tangent_grad_out_, const std::optional<Tensor>& attn_mask, bool is_causal,
    double scale) {
  const Tensor query = plain_rows(query_), key = plain_rows(key_), value = plain_rows(value_), grad_out = plain_rows(grad_out_);
  const Tensor tangent_query = plain_rows(tangent_query_), tangent_key = plain_rows(tangent_key_);
  const Tensor tangent_value = plain_rows(tangent_value_), lse = torch::stable::contiguous(lse_);
  std::optional<Tensor> tangent_grad_out;
  if (tangent_grad_out_) tangent_grad_out.emplace(plain_rows(*tangent_grad_out_));
  Tensor tangent_out = output_like(out), tangent_grad_query = output_like(query);
  Tensor tangent_grad_key = output_like(key), tangent_grad_value = output_like(value);
  with_element_type(query, [&](auto zero) {
    using T = decltype(zero);
    using M = Matrices<const T>;
    std::optional<M> tangent_g;
    if (tangent_grad_out) tangent_g.emplace(*tangent_grad_out);
    backward_jvp(Problem<T>(query, key, value, attn_mask, is_causal, scale), data<T>(lse), M(grad_out),
                 Tangents<T>{M(tangent_query), M(tangent_key), M(tangent_value)}, tangent_g, Matrices<T>(tangent_out),
                 Matrices<T>(tangent_grad_query), KeySums<T>{Matrices<T>(tangent_grad_key), Matrices<T>(tangent_grad_value)});
  });
  return {tangent_out, tangent_grad_query, tangent_grad_key, tangent_grad_value};
}

}  // namespace metafast

STABLE_TORCH_LIBRARY_IMPL(metafast, CPU, library) {
  library.impl("attention_forward", TORCH_BOX(&metafast::attention_forward));
  library.impl("attention_backward", TORCH_BOX(&metafast::attention_backward));
  library.impl("attention_jvp", TORCH_BOX(&metafast::attention_jvp));
  library.impl("attention_backward_jvp", TORCH_BOX(&metafast::attention_backward_jvp));
}
