/* core/engine/data_kind.c - see data_kind.h.
 *
 * Raw uint16 tokens have no mark of their own, and almost any bytes are possible tokens of a vocabulary of 50,257.  So
 * other formats are known by their marks, of at least three bytes; text by what it lacks, which are control characters
 * (the high byte of a frequent token is one, and in tokens that are bytes it is 0); and integers of 32 or 64 bits by
 * high halves that are all next to nothing. */
#include "engine/data_kind.h"

#include <stdbool.h>
#include <string.h>

#define TOKENIZE "make tokens of it: phalanx data tokenize TEXT... -o OUT.bin"
#define EXTRACT "write its tokens as raw uint16, in NumPy: tokens.astype('uint16').tofile('OUT.bin')"
#define DECOMPRESS "decompress it first"
#define NO_TOKENS "name a token file, as phalanx data tokenize makes them"

static const struct {
  size_t at, n;
  const char *bytes, *what, *advice;
} marks[] = {
    {0, 6, "\x93NUMPY", "a NumPy array", EXTRACT},
    {0, 3, "\x1f\x8b\x08", "compressed by gzip", DECOMPRESS},
    {0, 4, "\x28\xb5\x2f\xfd", "compressed by zstd", DECOMPRESS},
    {0, 6, "\xfd\x37zXZ\0", "compressed by xz", DECOMPRESS},
    {0, 4, "\x04\x22\x4d\x18", "compressed by lz4", DECOMPRESS},
    {4, 6, "\x31\x41\x59\x26\x53\x59", "compressed by bzip2", DECOMPRESS},
    {0, 4, "PK\x03\x04", "a zip archive (as NumPy's .npz and PyTorch's .pt are)", EXTRACT},
    {0, 4, "PAR1", "a Parquet file", EXTRACT},
    {0, 6, "ARROW1", "an Arrow file", EXTRACT},
    {0, 8, "\xff\xff\xff\xff\x10\x00\x00\x00", "an Arrow stream", EXTRACT},
    {0, 8, "\x89HDF\r\n\x1a\n", "an HDF5 file", EXTRACT},
    {257, 5, "ustar", "a tar archive", "unpack it first"},
    {0, 9, "MMIDIDX\0\0", "Megatron's index of a data set", "name the .bin file beside it"},
    {0, 15, "SQLite format 3", "a SQLite database", EXTRACT},
    {0, 4, "\x7f" "ELF", "a program", NO_TOKENS},
    {0, 5, "%PDF-", "a PDF document", NO_TOKENS},
    {0, 4, "GGUF", "a GGUF model", NO_TOKENS},
    {0, 8, "\x89PNG\r\n\x1a\n", "a PNG picture", NO_TOKENS},
    {0, 4, "\xff\xd8\xff\xe0", "a JPEG picture", NO_TOKENS},
};

static bool is_safetensors(const unsigned char *head, size_t n, int64_t bytes) {
  uint64_t length;
  if (n < 10) return false;
  memcpy(&length, head, sizeof length);
  return length > 1 && length <= (uint64_t)bytes - 8 && head[8] == '{' && head[9] == '"';
}

/* Protocols 4 and 5 begin with a frame that fits into the file, 2 and 3 with a container or an import. */
static bool is_pickle(const unsigned char *head, size_t n, int64_t bytes) {
  uint64_t length;
  if (n < 11 || head[0] != 0x80) return false;
  memcpy(&length, head + 3, sizeof length);
  if (head[1] == 4 || head[1] == 5) return head[2] == 0x95 && length <= (uint64_t)bytes - 11;
  return (head[1] == 2 || head[1] == 3) && head[2] != 0 && strchr("](}c", head[2]) && head[3] == 'q';
}

/* UTF-8, or any other writing in bytes: one control character in a hundred bytes at most, spaces excepted. */
static bool is_text(const unsigned char *head, size_t n) {
  enum { LEAST = 64 };
  size_t control = 0;
  for (size_t i = 0; i < n; i++)
    control += (head[i] < 0x20 && !(head[i] >= '\t' && head[i] <= '\r') && head[i] != 0x1b) || head[i] == 0x7f;
  return n >= LEAST && control * 100 <= n;
}

/* Of integers of 32 bits below 4 x 65536 (64 bits come to the same), one half is nearly nothing. */
static bool is_wide(const unsigned char *head, size_t n) {
  enum { LEAST = 64, SMALL = 3 };
  unsigned most[2] = {0, 0};
  for (size_t i = 0; i + 4 <= n; i += 4)
    for (size_t half = 0; half < 2; half++) {
      const unsigned little = head[i + 2 * half] | (unsigned)head[i + 2 * half + 1] << 8;
      const unsigned big = head[i + 2 * half + 1] | (unsigned)head[i + 2 * half] << 8;
      const unsigned word = little < big ? little : big;
      most[half] = word > most[half] ? word : most[half];
    }
  return n >= LEAST && (most[0] <= SMALL) != (most[1] <= SMALL);
}

const char *phx__data_mark_of(const unsigned char *head, size_t n) {
  for (size_t i = 0; i < sizeof marks / sizeof marks[0]; i++)
    if (n >= marks[i].at + marks[i].n && !memcmp(head + marks[i].at, marks[i].bytes, marks[i].n)) return marks[i].what;
  return NULL;
}

phx__data_kind phx__data_kind_of(const unsigned char *head, size_t n, int64_t bytes) {
  for (size_t i = 0; i < sizeof marks / sizeof marks[0]; i++)
    if (n >= marks[i].at + marks[i].n && !memcmp(head + marks[i].at, marks[i].bytes, marks[i].n))
      return (phx__data_kind){marks[i].what, marks[i].advice};
  if (is_safetensors(head, n, bytes)) return (phx__data_kind){"a safetensors file", NO_TOKENS};
  if (is_pickle(head, n, bytes)) return (phx__data_kind){"a Python pickle", EXTRACT};
  if (is_text(head, n)) return (phx__data_kind){"text", TOKENIZE};
  if (is_wide(head, n)) return (phx__data_kind){"integers of 32 or 64 bits", EXTRACT};
  return (phx__data_kind){NULL, NULL};
}
