// Launches through the CUDA driver itself.
//
// Its functions are looked up in the library that the process has loaded, so that nothing of CUDA is
// needed to build this one. What a kernel is given is worked out in Python
// (backends/triton/compiled.py).

#pragma once

#include <dlfcn.h>

#include <array>
#include <string>

#include <c10/core/Device.h>
#include <c10/util/Exception.h>
#include <torch/csrc/utils/pybind.h>

namespace wn_kernels {

namespace py = pybind11;

class Driver {
 public:
  // Null where there is no driver.
  static const Driver* find() {
    static const Driver driver;
    return driver.is_complete_ ? &driver : nullptr;
  }

  // Makes the device's context the thread's own where it has none, as a new thread may not.
  void ensure_context(int device) const {
    void* context = nullptr;
    check(get_context_(&context), "cuCtxGetCurrent");
    if (context) return;
    int handle = 0;
    check(get_device_(&handle, device), "cuDeviceGet");
    check(retain_context_(&context, handle), "cuDevicePrimaryCtxRetain");
    check(set_context_(context), "cuCtxSetCurrent");
  }

  void launch(
      void* function, const std::array<unsigned, 3>& grid, unsigned threads, unsigned shared,
      void* stream, void** parameters, const std::string& name) const {
    const int error = launch_(
        function, grid[0], grid[1], grid[2], threads, 1, 1, shared, stream, parameters, nullptr);
    if (error) check(error, "the launch of " + name);
  }

 private:
  Driver() {
    void* library = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL);
    if (!library) return;
    is_complete_ = get(library, "cuLaunchKernel", launch_) &&
                   get(library, "cuCtxGetCurrent", get_context_) &&
                   get(library, "cuCtxSetCurrent", set_context_) &&
                   get(library, "cuDeviceGet", get_device_) &&
                   get(library, "cuDevicePrimaryCtxRetain", retain_context_) &&
                   get(library, "cuGetErrorString", error_string_);
  }

  template <typename Function>
  static bool get(void* library, const char* name, Function& function) {
    function = reinterpret_cast<Function>(dlsym(library, name));
    return function != nullptr;
  }

  void check(int error, const std::string& what) const {
    if (!error) return;
    const char* text = nullptr;
    error_string_(error, &text);
    TORCH_CHECK(false, what, " failed: ", text ? text : "unknown error", " (CUDA error ", error, ")");
  }

  bool is_complete_ = false;
  int (*launch_)(
      void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**,
      void**) = nullptr;
  int (*get_context_)(void**) = nullptr;
  int (*set_context_)(void*) = nullptr;
  int (*get_device_)(int*, int) = nullptr;
  int (*retain_context_)(void**, int) = nullptr;
  int (*error_string_)(int, const char**) = nullptr;
};

// A kernel with all that the driver is given but the addresses of its tensors, which are its first
// parameters.
class Kernel {
 public:
  static constexpr size_t most_parameters = 64;

  explicit Kernel(const py::handle& kernel)
      : name_(kernel.attr("name").cast<std::string>()),
        function_(reinterpret_cast<void*>(kernel.attr("function").cast<uintptr_t>())),
        grid_(kernel.attr("grid").cast<std::array<unsigned, 3>>()),
        threads_(kernel.attr("threads").cast<unsigned>()),
        shared_(kernel.attr("shared").cast<unsigned>()),
        scalars_(kernel.attr("scalars").cast<std::vector<uint64_t>>()) {}

  // Launches on tensors at these addresses. Processors are little-endian here: the first bytes of a
  // number are the same number in a smaller type.
  void operator()(const uint64_t* addresses, size_t count, void* stream) const {
    void* parameters[most_parameters];
    size_t i = 0;
    for (; i < count; ++i) parameters[i] = const_cast<uint64_t*>(addresses + i);
    for (const uint64_t& scalar : scalars_) parameters[i++] = const_cast<uint64_t*>(&scalar);
    Driver::find()->launch(function_, grid_, threads_, shared_, stream, parameters, name_);
  }

 private:
  std::string name_;
  void* function_;
  std::array<unsigned, 3> grid_;
  unsigned threads_, shared_;
  std::vector<uint64_t> scalars_;
};

}  // namespace wn_kernels
