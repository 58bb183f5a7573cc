// Which kernels this machine runs.

#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "kernels.h"

#if defined(BLOCKPRESS_X86)
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#endif
#if defined(BLOCKPRESS_ARM64)
#if defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(_WIN32)
#include <windows.h>
#endif
#endif

namespace blockpress {
namespace {

#if defined(BLOCKPRESS_X86)

struct Leaf {
  uint32_t ebx, ecx;
};

Leaf CpuId(uint32_t leaf) {
#if defined(_MSC_VER)
  int r[4] = {};
  __cpuid(r, 0);
  if (static_cast<uint32_t>(r[0]) < leaf) return {};
  __cpuidex(r, static_cast<int>(leaf), 0);
  return {static_cast<uint32_t>(r[1]), static_cast<uint32_t>(r[2])};
#else
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid_count(leaf, 0, &eax, &ebx, &ecx, &edx) == 0) return {};
  return {ebx, ecx};
#endif
}

// eax of one of the extended leaves, which are AMD's own from 0x80000009 on; 0 where the processor does not have it.
uint32_t ExtendedCpuId(uint32_t leaf) {
#if defined(_MSC_VER)
  int r[4] = {};
  __cpuid(r, static_cast<int>(0x80000000u));
  if (static_cast<uint32_t>(r[0]) < leaf) return 0;
  __cpuid(r, static_cast<int>(leaf));
  return static_cast<uint32_t>(r[0]);
#else
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(leaf, &eax, &ebx, &ecx, &edx) == 0 ? 0 : eax;
#endif
}

// The register sets that the operating system saves at a task switch.
uint64_t SavedState() {
#if defined(_MSC_VER)
  return _xgetbv(0);
#else
  uint32_t eax, edx;
  __asm__("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
  return static_cast<uint64_t>(edx) << 32 | eax;
#endif
}

bool Has(uint32_t flags, std::initializer_list<int> bits) {
  for (int bit : bits) {
    if ((flags >> bit & 1) == 0) return false;
  }
  return true;
}

bool SavesState(uint64_t wanted) {
  constexpr int kOsSavesState = 27;
  return Has(CpuId(1).ecx, {kOsSavesState}) && (SavedState() & wanted) == wanted;
}

bool RunsAvx2() {
  constexpr int kFma = 12, kPopcnt = 23, kAvx = 28, kF16c = 29; // leaf 1, ecx
  constexpr int kBmi1 = 3, kAvx2 = 5, kBmi2 = 8; // leaf 7, ebx
  return Has(CpuId(1).ecx, {kFma, kPopcnt, kAvx, kF16c}) && Has(CpuId(7).ebx, {kBmi1, kAvx2, kBmi2}) &&
         SavesState(0x06);
}

bool RunsAvx512() {
  constexpr int kF = 16, kDq = 17, kBw = 30, kVl = 31; // leaf 7, ebx
  constexpr int kVbmi2 = 6, kVnni = 11; // leaf 7, ecx
  const Leaf seven = CpuId(7);
  return RunsAvx2() && Has(seven.ebx, {kF, kDq, kBw, kVl}) && Has(seven.ecx, {kVbmi2, kVnni}) && SavesState(0xe6);
}

// Whether this is an AMD processor with units of 128 bits, which take vectors of 256 in halves.
bool IsNarrow() {
  constexpr uint32_t kFp128 = 1u << 0, kFp256 = 1u << 2; // of eax
  const uint32_t units = ExtendedCpuId(0x8000001a);
  return (units & kFp128) != 0 && (units & kFp256) == 0;
}

#endif
#if defined(BLOCKPRESS_ARM64)

bool RunsNeon() {
#if defined(__APPLE__)
  return true; // every such Mac
#elif defined(__linux__)
  return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#elif defined(_WIN32)
  return IsProcessorFeaturePresent(PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE) != 0;
#else
  return false;
#endif
}

#endif

struct Choice {
  const char* name;
  const Kernels* kernels; // null where this library was built without them
  bool runs;
  bool suits = true; // whether it is the better choice than those that follow
};

// Best first.
const Choice* Choices(size_t* count) {
  static const Choice choices[] = {
#if defined(BLOCKPRESS_X86)
      {"avx512", &kAvx512Kernels, RunsAvx512()},
      {"avx2-128", &kNarrowAvx2Kernels, RunsAvx2(), IsNarrow()},
      {"avx2", &kAvx2Kernels, RunsAvx2()},
#else
      {"avx512", nullptr, false},
      {"avx2-128", nullptr, false},
      {"avx2", nullptr, false},
#endif
#if defined(BLOCKPRESS_ARM64)
      {"neon", &kNeonKernels, RunsNeon()},
#else
      {"neon", nullptr, false},
#endif
      {"scalar", &kScalarKernels, true},
  };
  *count = sizeof choices / sizeof choices[0];
  return choices;
}

} // namespace

const Kernels* BestKernels(const char** error) {
  size_t count;
  const Choice* choices = Choices(&count);
  const char* wanted = std::getenv("BLOCKPRESS_RUNTIME_ISA");
  const bool any = wanted == nullptr || wanted[0] == '\0';
  for (size_t i = 0; i < count; ++i) {
    const Choice& choice = choices[i];
    if (any ? choice.runs && choice.suits : std::strcmp(wanted, choice.name) == 0) {
      if (choice.runs) return choice.kernels;
      *error = choice.kernels == nullptr
                   ? "BLOCKPRESS_RUNTIME_ISA names kernels that this library was built without; unset it"
                   : "BLOCKPRESS_RUNTIME_ISA names kernels that this processor cannot run; unset it";
      return nullptr;
    }
  }
  *error = "BLOCKPRESS_RUNTIME_ISA must be scalar, avx2, avx2-128, avx512 or neon, or unset for the best this machine runs";
  return nullptr;
}

} // namespace blockpress
