// What an attention kernel is told, on any device. The schemas are in metafast/ops/attention/library.py, the formulas and
// their names in metafast/ops/attention/README.md.
//
// Shapes: query [*lead, Hq, Nq, D], key [*lead, Hk, Nk, D], value [*lead, Hk, Nk, Dv], attn_mask [*lead, Hq, Nq, Nk] (bool
// or query's dtype, broadcast by strides of 0), lse [*lead, Hq, Nq]. Query head h reads key head h / (Hq / Hk).
// Any strides; out and the gradients come in the memory order of what they are shaped like.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace metafast {

using torch::stable::Tensor;

// (out, lse)
std::tuple<Tensor, Tensor> attention_forward(
    const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& attn_mask,
    bool is_causal, double scale);

// (grad_query, grad_key, grad_value)
std::tuple<Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad_out, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out,
    const Tensor& lse, const std::optional<Tensor>& attn_mask, bool is_causal, double scale);

// tangent_out
Tensor attention_jvp(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out, const Tensor& lse,
    const Tensor& tangent_query, const Tensor& tangent_key, const Tensor& tangent_value,
    const std::optional<Tensor>& attn_mask, bool is_causal, double scale);

// (tangent_out, tangent_grad_query, tangent_grad_key, tangent_grad_value)
std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward_jvp(
    const Tensor& grad_out, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out,
    const Tensor& lse, const Tensor& tangent_query, const Tensor& tangent_key, const Tensor& tangent_value,
    const std::optional<Tensor>& tangent_grad_out, const std::optional<Tensor>& attn_mask, bool is_causal,
    double scale);

}  // namespace metafast
