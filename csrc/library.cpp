// The extension module metafast._C. Importing it registers the kernels of the files beside it with torch's dispatcher
// (the schemas are in metafast/ops/<op>/library.py); the module itself only says how it was built.

#include <Python.h>

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

PyObject* build_info(PyObject*, PyObject*) {
  const char* const architectures =
#ifdef METAFAST_CUDA_ARCHITECTURES
      METAFAST_CUDA_ARCHITECTURES;
#else
      nullptr;  // None
#endif
  return Py_BuildValue(
      "{s:s, s:s, s:s, s:s, s:z}", "compiler", compiler(), "flags", METAFAST_FLAGS, "abi_target",
      METAFAST_STRING(TORCH_TARGET_VERSION), "cpu_capability", metafast::capability_name(metafast::cpu_capability()),
      "cuda_architectures", architectures);
}

PyMethodDef methods[] = {
    {"build_info", build_info, METH_NOARGS, "Compiler, flags, ABI target and what the kernels use on this machine."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", "Compiled kernels of metafast", 0, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
