// bfloat16 in memory, float32 in registers.
#pragma once

#include <cstdint>
#include <cstring>

namespace tandem {

struct Bfloat16 {
  std::uint16_t bits;
};

inline float widen(float x) { return x; }

inline float widen(Bfloat16 x) {
  const std::uint32_t bits = std::uint32_t(x.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

inline void put(float x, float* to) { *to = x; }

// To the nearest, ties to even, as PyTorch rounds; branch-free so that loops over it vectorise.
inline void put(float x, Bfloat16* to) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const std::uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  to->bits = x != x ? std::uint16_t(0x7FC0) : std::uint16_t(rounded);
}

}  // namespace tandem
