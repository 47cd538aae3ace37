// What every set of instructions writes its functions with: inlined always, as a call would cost more than they do.
#pragma once

#if defined(_MSC_VER) && !defined(__clang__)
#define LOWBIT_INLINE_MEMBER __forceinline
#else
#define LOWBIT_INLINE_MEMBER inline __attribute__((always_inline))
#endif
#define LOWBIT_INLINE static LOWBIT_INLINE_MEMBER
