// The extension module metafast._C. Importing it registers the kernels of the files beside it with torch's dispatcher
// (the schemas are in metafast/ops/<op>/library.py); the module itself only says how it was built.

#include <pybind11/pybind11.h>

#include "cpu/isa/capability.h"

#define METAFAST_STRING_(x) #x
#define METAFAST_STRING(x) METAFAST_STRING_(x)

namespace {

const char* compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["compiler"] = compiler();
  info["flags"] = METAFAST_FLAGS;
  info["abi_target"] = METAFAST_STRING(TORCH_TARGET_VERSION);
  info["cpu_capability"] = metafast::capability_name(metafast::cpu_capability());
#ifdef METAFAST_CUDA_ARCHITECTURES
  info["cuda_architectures"] = METAFAST_CUDA_ARCHITECTURES;
#else
  info["cuda_architectures"] = pybind11::none();
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled kernels of metafast";
  module.def("build_info", &build_info, "Compiler, flags, ABI target and what the kernels use on this machine.");
}
