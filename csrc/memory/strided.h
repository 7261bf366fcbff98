// How arrays of one shape and different strides are walked together.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace optim_ext::memory {

constexpr int kMostArrays = 10;

// One dimension of all arrays; strides count elements. Those of arrays that are not `used` mean nothing.
struct WalkDim {
  int64_t size;
  std::array<int64_t, kMostArrays> strides;
};

// From the outermost dimension to the fastest.
struct Walk {
  std::vector<WalkDim> dims;
  unsigned used;  // bit k: array k is there
};

// The array that lies as most of them do; `leader` where none has more of its kind.
int most_common(const Walk& walk, int leader);

// The dimensions in the order in which the leader lies in memory, so that it is read front to back where it is dense.
void order(Walk& walk, int leader);

// Makes one dimension of neighbouring ones that can be walked as one, and leaves out those of size one.
void merge(Walk& walk);

// Small matrices that share factors: corresponding elements of neighbouring ones make longer runs than rows do. Changes
// the order of elements, so only for a walk that no other has to follow.
void lengthen_runs(Walk& walk);

// A large matrix that one array holds by rows and another by columns is walked in small squares, so that the cache
// lines of both are used whole. Changes the order of elements, too.
void make_squares(Walk& walk);

// Leaves at most `most` dimensions. The outermost become one whose places are listed: the one of index i in array k is
// element k * size + i of the list, to be multiplied by a stride of one; arrays that are not used get those of dense
// ones. The list is empty where there is nothing to do.
std::vector<int64_t> list_outer(Walk& walk, size_t most);

}  // namespace optim_ext::memory
