// Results that are given to be written.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace metafast {

// A result: written in the type and memory order that a kernel writes, and given in those that are asked for.
class Output {
 public:
  // `written` is `given`, or another tensor of its sizes that takes its place.
  Output(const torch::stable::Tensor& given, const torch::stable::Tensor& written) : tensor(written), given_(given) {}

  const torch::stable::Tensor tensor;

  void give() const {
    torch::stable::Tensor given = given_;
    if (given.data_ptr() != tensor.data_ptr()) torch::stable::copy_(given, tensor);
  }

 private:
  torch::stable::Tensor given_;
};

inline Output contiguous_output(const torch::stable::Tensor& given) { return {given, torch::stable::contiguous(given)}; }

}  // namespace metafast
