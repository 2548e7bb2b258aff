// The Python module lfcc_kernels._host: facts about the build and the CPU, and the CPU's copy bandwidth. It includes no
// torch header, and the kernels do not need it.
#include <pybind11/pybind11.h>

#include <omp.h>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>

#include "cpu/clones.h"

namespace py = pybind11;

namespace {

py::dict build() {
  py::dict facts;
  facts["compiler"] = LFCC_COMPILER;
  facts["flags"] = LFCC_FLAGS;
  facts["torch"] = LFCC_BUILD_TORCH;
  facts["machine"] = LFCC_BUILD_MACHINE;
  facts["cpu_levels"] = LFCC_CPU_LEVELS;
  facts["cuda"] = LFCC_CUDA;
  facts["cuda_architectures"] = LFCC_CUDA_ARCHITECTURES;
  return facts;
}

// The level whose clones the loader selects on this CPU.
const char* cpu_level() {
#ifdef LFCC_CLONED
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return "AVX-512";
  if (__builtin_cpu_supports("x86-64-v3")) return "AVX2";
#endif
  return "baseline";
}

// Copies bypassing the caches, as kernels write large outputs; a plain store would first read the line it writes to.
void stream_copy(char* destination, const char* source, size_t bytes) {
#ifdef __SSE2__
  const size_t vectors = bytes / sizeof(__m128i);
  for (size_t i = 0; i < vectors; ++i) {
    const __m128i value = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source) + i);
    _mm_stream_si128(reinterpret_cast<__m128i*>(destination) + i, value);
  }
  _mm_sfence();
#else
  std::memcpy(destination, source, bytes);
#endif
}

void plain_copy(char* destination, const char* source, size_t bytes) { std::memcpy(destination, source, bytes); }

double copy_bandwidth(size_t bytes, int repeats) {
  if (repeats < 1) throw std::invalid_argument("copy_bandwidth: repeats must be at least 1");
  constexpr size_t line = 64;
  const size_t lines = std::max<size_t>(bytes / line, 1);
  const auto buffer = [&] { return std::unique_ptr<char, decltype(&std::free)>(
      static_cast<char*>(std::aligned_alloc(line, lines * line)), &std::free); };
  const auto source = buffer(), destination = buffer();
  if (!source || !destination) throw std::bad_alloc();
  double best = std::numeric_limits<double>::infinity();
  // The first round is not timed: it maps the pages, on the NUMA node of the thread that copies them.
  for (int round = 0; round <= repeats; ++round) {
    for (const auto copy : {plain_copy, stream_copy}) {
      const auto start = std::chrono::steady_clock::now();
#pragma omp parallel
      {
        const size_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        const size_t begin = lines * thread / threads * line, end = lines * (thread + 1) / threads * line;
        if (round == 0) std::memset(source.get() + begin, 1, end - begin);
        copy(destination.get() + begin, source.get() + begin, end - begin);
      }
      const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
      if (round > 0) best = std::min(best, seconds.count());
    }
  }
  return 2.0 * lines * line / best / 1e9;
}

}  // namespace

PYBIND11_MODULE(_host, module) {
  module.doc() = "Facts about the build of lfcc_kernels and about this CPU.";
  module.def("build", &build, "Compiler, flags, torch and machine of the build, and the targets of its kernels.");
  module.def("cpu_level", &cpu_level, "The level whose kernels run on this CPU: 'baseline', 'AVX2' or 'AVX-512'.");
  module.def("cores", &omp_get_num_procs, "Number of cores that this process may use.");
  module.def("copy_bandwidth", &copy_bandwidth, py::arg("bytes"), py::arg("repeats"),
             py::call_guard<py::gil_scoped_release>(),
             "Gigabytes (1e9) read plus written per second by a copy of `bytes` bytes on all OpenMP threads: the best "
             "of `repeats`, by memcpy or by streaming stores, whichever is faster.");
}
