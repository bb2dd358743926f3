// A checksum of bytes at the speed of memory, against faults of disks and of our own writes, not against attackers.
//
// Each lane is a polynomial of its words modulo 2^32 in an odd number, so the change of one word is never lost.

#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "vectors.h"

namespace {

constexpr int kVectors = 4;  // at once, so that products need not wait for each other
constexpr int64_t kBlock = kVectors * sizeof(Words);
constexpr uint32_t kFactor = 0x9e3779b1u;
constexpr uint64_t kPrime = 0x100000001b3u;  // FNV-1a, for what is left

inline void add(Words* sums, const uint8_t* from) {
  for (int i = 0; i < kVectors; ++i)
    sums[i] = sums[i] * kFactor + *reinterpret_cast<const Words*>(from + i * sizeof(Words));
}

}  // namespace

extern "C" uint64_t nibble_checksum(const uint8_t* bytes, int64_t count) {
  Words sums[kVectors] = {};
  int64_t i = 0;
  for (; i + kBlock <= count; i += kBlock) add(sums, bytes + i);
  if (i < count) {
    uint8_t last[kBlock] = {};
    std::memcpy(last, bytes + i, count - i);
    add(sums, last);
  }
  uint64_t digest = 0xcbf29ce484222325u ^ uint64_t(count);
  for (const Words& sum : sums)
    for (int lane = 0; lane < kLanes; ++lane) digest = (digest ^ sum[lane]) * kPrime;
  return digest;
}
