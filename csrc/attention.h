// What an attention kernel is told, on any device. The schemas are in metafast/ops/attention/library.py, the formulas and
// their names in metafast/ops/attention/README.md.
//
// Shapes: query [*lead, Hq, Nq, D], key [*lead, Hk, Nk, D], value [*lead, Hk, Nk, Dv], attn_mask [*lead, Hq, Nq, Nk] (bool
// or query's dtype; any dimension may be 1 instead), seeds int64 [*lead], statistics [*lead, Hq, Nq, 2] (the largest score of
// a row, and the log of the sum of exp(score - that); float32, or float64 with float64 inputs). Query head h reads key head
// h / (Hq / Hk). Row i attends to columns i - left <= j <= i + right; -1 means no limit. Any strides; out and the gradients
// come in the memory order of what they are shaped like.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace metafast {

using torch::stable::Tensor;

// What all passes are told besides their tensors.
struct Options {
  const std::optional<Tensor>& attn_mask;
  const std::optional<Tensor>& seeds;
  int64_t left, right;
  double dropout_p, scale;
  // Inputs are bfloat16, so products may round what they multiply to that type.
  bool bfloat16;
};

// (out, statistics)
std::tuple<Tensor, Tensor> attention_forward(
    const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& attn_mask,
    const std::optional<Tensor>& seeds, int64_t left, int64_t right, double dropout_p, double scale);

// (grad_query, grad_key, grad_value)
std::tuple<Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad_out, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out,
    const Tensor& statistics, const std::optional<Tensor>& attn_mask, const std::optional<Tensor>& seeds, int64_t left,
    int64_t right, double dropout_p, double scale);

// tangent_out
Tensor attention_jvp(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out, const Tensor& statistics,
    const Tensor& tangent_query, const Tensor& tangent_key, const Tensor& tangent_value,
    const std::optional<Tensor>& tangent_mask, const std::optional<Tensor>& attn_mask, const std::optional<Tensor>& seeds,
    int64_t left, int64_t right, double dropout_p, double scale);

// (tangent_out, tangent_grad_query, tangent_grad_key, tangent_grad_value)
std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward_jvp(
    const Tensor& grad_out, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out,
    const Tensor& statistics, const Tensor& tangent_query, const Tensor& tangent_key, const Tensor& tangent_value,
    const std::optional<Tensor>& tangent_mask, const std::optional<Tensor>& tangent_grad_out,
    const std::optional<Tensor>& attn_mask, const std::optional<Tensor>& seeds, int64_t left, int64_t right,
    double dropout_p, double scale);

// The gradient of an additive attn_mask, of its shape: summed over what the mask is broadcast to.
Tensor attention_mask_backward(
    const Tensor& grad_out, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out,
    const Tensor& statistics, const std::optional<Tensor>& attn_mask, const std::optional<Tensor>& seeds, int64_t left,
    int64_t right, double dropout_p, double scale);

// The tangent of that gradient.
Tensor attention_mask_backward_jvp(
    const Tensor& grad_out, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out,
    const Tensor& statistics, const Tensor& tangent_query, const Tensor& tangent_key, const Tensor& tangent_value,
    const std::optional<Tensor>& tangent_mask, const std::optional<Tensor>& tangent_grad_out,
    const std::optional<Tensor>& attn_mask, const std::optional<Tensor>& seeds, int64_t left, int64_t right,
    double dropout_p, double scale);

}  // namespace metafast
