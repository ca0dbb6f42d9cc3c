/* core/loader_search.h - between loader.c and loader_search.c: directories and trust.  [main] only. */
#ifndef PHX__LOADER_SEARCH_H
#define PHX__LOADER_SEARCH_H
#include "loader.h"

#include <sys/stat.h>

enum { PHX__SEARCH_MOST = 32 };
typedef struct phx__search {
  char *directories[PHX__SEARCH_MOST]; /* real paths, each once, in search order */
  size_t n;
} phx__search;

phx_status phx__search_open(const char *configured, phx__search *out, phx_error *err);
void phx__search_close(phx__search *search);

/* loader_trust.c: the way to a file, each directory and link of it. */
phx_status phx__path_trusted(const char *path, phx_error *err);
/* The file itself, which is open; *info: what it is. */
phx_status phx__file_trusted(int fd, const char *path, struct stat *info, phx_error *err);
#endif
