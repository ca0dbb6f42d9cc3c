/* ranks.c - Open MPI's side of bench_comm: ranks that serve collectives, in place, from one buffer each.
 * ./openmpi_ranks PAGE MAX_BYTES, under mpirun with SERVE_RANKS ranks. */
#include <fcntl.h>
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include "../comm_server.h"

static void round_of(const comm_server *s, float *x, int rank) {
  const int numel = (int)(s->bytes / 4), part = numel / SERVE_RANKS;
  serve_touch(s, x);
  if (s->what == SERVE_ALL_REDUCE) MPI_Allreduce(MPI_IN_PLACE, x, numel, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
  if (s->what == SERVE_REDUCE_SCATTER)
    MPI_Reduce_scatter_block(MPI_IN_PLACE, x, part, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
  if (s->what == SERVE_ALL_GATHER) MPI_Allgather(MPI_IN_PLACE, 0, MPI_FLOAT, x, part, MPI_FLOAT, MPI_COMM_WORLD);
  (void)rank;
}

int main(int argc, char **argv) {
  int rank = 0, size = 0, length = 0, fd = argc == 3 ? open(argv[1], O_RDWR) : -1;
  char version[MPI_MAX_LIBRARY_VERSION_STRING];
  if (fd < 0) return 2;
  MPI_Init(&argc, &argv);
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  comm_server *s = mmap(NULL, sizeof *s, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  const size_t bytes = (size_t)atoll(argv[2]), huge = (size_t)2 << 20;
  float *x = aligned_alloc(huge, (bytes + huge - 1) / huge * huge);
  if (s == MAP_FAILED || !x || size != SERVE_RANKS) MPI_Abort(MPI_COMM_WORLD, 1);
  madvise(x, bytes, MADV_HUGEPAGE);
  memset(x, 0, bytes);
  MPI_Get_library_version(version, &length);
  version[strcspn(version, ",")] = 0;
  if (rank == 0) snprintf(s->about, sizeof s->about, "%s", version);
  for (uint32_t number = 0;;) {
    number = serve_next(s, number);
    if (s->what == SERVE_QUIT) break;
    round_of(s, x, rank); /* warm */
    MPI_Barrier(MPI_COMM_WORLD);
    const double begin = serve_now();
    for (int i = 0; i < s->rounds; i++) round_of(s, x, rank);
    serve_done(s, rank, number, (serve_now() - begin) / s->rounds);
  }
  MPI_Finalize();
  return 0;
}
