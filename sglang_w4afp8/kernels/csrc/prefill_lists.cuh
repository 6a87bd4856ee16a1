// What prefill_route.cu tells the matrix kernels of rows in the order of the list.
#pragma once

// A row's token and pair. The last row of a token adds up what the token's rows contribute.
struct Owner {
  int token, pair;
  unsigned parts;  // a token's only row: its weight; the last of several: how many; others: 0
  int slot;        // of y; -1: the token has no other row
};

// A contribution to a token, in the order of k.
struct Part {
  int slot;
  float weight;
};

// Tokens in the order of the list lie in blocks of so many rows, all columns of a block together: a
// row that is written does not touch as many pages as it has panels.
constexpr int kBlockRows = 256;
