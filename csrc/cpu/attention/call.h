// From the dispatcher's tensors to what the passes read, and back.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <stdexcept>
#include <vector>

#include "attention.h"
#include "cpu/attention/problem.h"
#include "cpu/output.h"

namespace metafast {

using torch::headeronly::ScalarType;

inline bool is_half(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Half || tensor.scalar_type() == ScalarType::BFloat16;
}

// The matrix products want rows that are contiguous and do not overlap (an expanded dimension has stride 0).
inline bool has_plain_rows(const Tensor& tensor) {
  const int64_t rank = tensor.dim(), columns = tensor.size(rank - 1);
  return (columns == 1 || tensor.stride(rank - 1) == 1) &&
      (tensor.size(rank - 2) == 1 || tensor.stride(rank - 2) >= columns);
}

// Half types are computed in float32: a copy of each input is small beside the scores that are never stored.
inline Tensor as_read(const Tensor& tensor) { return is_half(tensor) ? torch::stable::to(tensor, ScalarType::Float) : tensor; }

inline Tensor rows_as_read(const Tensor& tensor) {
  const Tensor read = as_read(tensor);
  return has_plain_rows(read) ? read : torch::stable::contiguous(read);
}

inline std::optional<Tensor> rows_as_read(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional<Tensor>(rows_as_read(*tensor)) : std::nullopt;
}

// An output [*lead, heads, rows, columns] beside an input: in the input's memory order where the shapes agree, as models
// hand over transposed views and take them back.
inline Tensor output_like(const Tensor& input, int64_t columns) {
  if (has_plain_rows(input) && input.size(input.dim() - 1) == columns) {
    Tensor output = torch::stable::empty_like(input);
    if (has_plain_rows(output)) return output;
  }
  std::vector<int64_t> sizes(input.sizes().begin(), input.sizes().end());
  sizes.back() = columns;
  return torch::stable::new_empty(input, sizes);
}

inline Tensor output_like(const Tensor& input) { return output_like(input, input.size(input.dim() - 1)); }

inline Output output_with_plain_rows(const Tensor& given) { return {given, rows_as_read(given)}; }

// What all passes read.
class Call {
 public:
  Call(const Tensor& query_, const Tensor& key_, const Tensor& value_, const Options& options)
      : query(rows_as_read(query_)), key(rows_as_read(key_)), value(rows_as_read(value_)), options_(options),
        is_bfloat16_(query_.scalar_type() == ScalarType::BFloat16) {
    if (options.attn_mask) options_.attn_mask.emplace(as_read(*options.attn_mask));
    if (options.seeds) options_.seeds.emplace(torch::stable::contiguous(*options.seeds));
    if (options.key_ranges) options_.key_ranges.emplace(torch::stable::contiguous(*options.key_ranges));
  }

  const Tensor query, key, value;

  // Calls body(problem), whose template argument is the type that is computed in.
  template <typename Body>
  void with_problem(Body body) const {
    switch (query.scalar_type()) {
      case ScalarType::Float: return body(Problem<float>(query, key, value, options_, is_bfloat16_));
      case ScalarType::Double: return body(Problem<double>(query, key, value, options_, is_bfloat16_));
      default: throw std::runtime_error("metafast attention (CPU): expected float16, bfloat16, float32 or float64");
    }
  }

 private:
  Options options_;
  bool is_bfloat16_;
};

// The directions of a derivative, as tensors.
class TangentTensors {
 public:
  TangentTensors(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& mask)
      : query_(rows_as_read(query)), key_(rows_as_read(key)), value_(rows_as_read(value)) {
    if (mask) mask_.emplace(as_read(*mask));
  }

  template <typename T>
  Tangents<T> read(const Problem<T>& problem) const {
    using M = Matrices<const T>;
    Tangents<T> tangents{M(query_, problem.lead), M(key_, problem.lead), M(value_, problem.lead), std::nullopt};
    if (mask_) tangents.mask.emplace(*mask_, problem.lead);
    return tangents;
  }

 private:
  Tensor query_, key_, value_;
  std::optional<Tensor> mask_;
};

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.data_ptr());
}

}  // namespace metafast
