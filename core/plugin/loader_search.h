/* core/plugin/loader_search.h - directories of plugins, what lies in them, and trust.  [main] only. */
#ifndef PHX__LOADER_SEARCH_H
#define PHX__LOADER_SEARCH_H
#include <phalanx/plugin.h>
#include <stdbool.h>
#include <sys/stat.h>

enum { PHX__SEARCH_MOST = 32 };
typedef struct phx__search {
  char *directories[PHX__SEARCH_MOST]; /* real paths, each once, in search order */
  size_t n;
} phx__search;

/* One file in the search path, for `phalanx plugins` and for "nearest name" hints. */
typedef struct phx__found {
  uint32_t kind;
  char name[40];
  char path[4096];
  bool shadowed; /* a directory searched earlier has the same kind and name */
  int order;     /* of its directory in the search */
} phx__found;
/* Everything found, sorted by kind, name and search order; freed with phx__free. Nothing is loaded. */
phx_status phx__loader_list(const char *search, phx__found **out, size_t *n, phx_error *err);

phx_status phx__search_open(const char *configured, phx__search *out, phx_error *err);
void phx__search_close(phx__search *search);

/* loader_trust.c: the way to a file, each directory and link of it. */
phx_status phx__path_trusted(const char *path, phx_error *err);
/* The file itself, which is open; *info: what it is. */
phx_status phx__file_trusted(int fd, const char *path, struct stat *info, phx_error *err);
#endif
