/* tests/support/command.h - running the command in a test: bounded in time, output kept, nothing left behind. */
#ifndef TEST_COMMAND_H
#define TEST_COMMAND_H
#include <stddef.h>

typedef struct command_result {
  int status;    /* exit status, or 128 + signal, or -1 when the time was up (the whole process group was killed) */
  char *out;     /* stdout and stderr together, up to 1 MiB; freed with command_free */
  double seconds;
} command_result;

/* argv[0] "phalanx" is the command of this build; cwd is `dir` unless NULL.  NULL-terminated. */
command_result command_run(const char *dir, double timeout_s, const char *const *argv);
void command_free(command_result *r);
/* A new empty directory below /tmp; removed with command_remove_dir. */
char *command_temp_dir(void);
void command_remove_dir(char *dir);
void command_write_file(const char *dir, const char *name, const void *data, size_t bytes);
/* The whole file as text, or NULL. */
char *command_read_file(const char *dir, const char *name);

/* Shared memory with a name of ours: jobs have none, so that a kill leaves nothing.  The directories that tests running
 * at the same time have there are no memory. */
int command_shared_memory(void);

#define RUN(dir, seconds, ...) command_run(dir, seconds, (const char *const[]){"phalanx", __VA_ARGS__, NULL})
#endif
