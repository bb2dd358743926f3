// Packed weights in memory, as kernels/cpu/blocked_layout.py makes them:
//   codes  [N/16][K/128][16 rows][planes] of 64 bytes: 32 words of 16 bits, of which word j holds in its nibble
//          i the code of channel 32 i + j of the 128. Codes of 2, 3 and 4 bits take one plane; codes of 8 bits
//          are two digits of 4: the plane of the low ones, then that of the high ones.
//          Or "in lanes", for lanes.h: [N/16][K/128][2 halves][8][planes] of 16 rows of 4 bytes. Byte c of entry q holds
//          the codes of channels 4 q + (0, 2, 1, 3)[c] of the half's first quarter (low nibble) and of its second one.
//   scale  [N/16][groups][16 rows], float16, bfloat16 or float32
//   zero   [N/16][groups][16 rows] bytes
// N is filled up to 64 rows, K to 128 channels with scales of 0.

#pragma once

namespace {

constexpr int kRows = 16;        // rows of a block
constexpr int kChunk = 128;      // channels of a chunk
constexpr int kPlane = 64;       // bytes of a plane

enum ScaleType : int { kHalf = 0, kBfloat = 1, kFloat = 2 };

struct Weight {
  const uint8_t* codes;
  const void* scale;
  const uint8_t* zero;  // or null
  int64_t blocks;       // of 16 rows
  int64_t chunks;       // of 128 channels
  int64_t groups;       // of a row
  int64_t per_chunk;    // groups of a chunk: 1, 2, 4; 0: one group for the whole row
  int64_t scale_type;
  int64_t planes;
  const uint8_t* midpoints;  // where there are no zero points: 64 times 2^(bits-1)
  int64_t in_lanes;
};

// Of the 16 rows; those of the next group follow.
inline const uint8_t* zeros_of(const Weight& w, int64_t block, int64_t group) {
  return w.zero ? w.zero + (block * w.groups + group) * kRows : w.midpoints;
}

}  // namespace
