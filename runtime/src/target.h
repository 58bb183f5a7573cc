// Compiles all that follows for one instruction set, however the rest is compiled. Include it after every other
// header, so that no function that other files share is compiled for a machine that may not be the one it runs on.
#pragma once

// A loop with many sums in registers gets them only where it is a function of its own; one that works on the registers of
// its caller only where it is a part of that.
#if defined(_MSC_VER)
#define BLOCKPRESS_NOINLINE __declspec(noinline)
#define BLOCKPRESS_INLINE __forceinline
#else
#define BLOCKPRESS_NOINLINE __attribute__((noinline))
#define BLOCKPRESS_INLINE inline __attribute__((always_inline))
#endif

#define BLOCKPRESS_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define BLOCKPRESS_TARGET(features)                                                                                   \
  BLOCKPRESS_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define BLOCKPRESS_TARGET_END BLOCKPRESS_PRAGMA(clang attribute pop)
#elif defined(__GNUC__)
#define BLOCKPRESS_TARGET(features) BLOCKPRESS_PRAGMA(GCC target(features))
#define BLOCKPRESS_TARGET_END
#else
#define BLOCKPRESS_TARGET(features)
#define BLOCKPRESS_TARGET_END
#endif
