/* tests/support/sys_record.h - what processes do to a directory, recorded at the core's table of system calls.
 *
 * sys_record_create before a fork; sys_record_install in each process, with the number that stands in its entries.  All
 * entries are in one order, which is the order in which the kernel saw the calls.  Only what lies in the directory is
 * recorded.  A call that the recorder does not know (a new member of the table), and one with a meaning that it cannot
 * give (a shared writable mapping, O_TMPFILE, a rename from one directory to another), end the process with a message;
 * what goes past the table is found by comparing what the entries come to with the directory (power_cut_compare). */
#ifndef TEST_SYS_RECORD_H
#define TEST_SYS_RECORD_H
#include <stdbool.h>
#include <stdint.h>

enum { SYS_RECORD_NAME = 64, SYS_RECORD_ENTRIES = 1 << 14, SYS_RECORD_OBJECTS = 1 << 12 };

typedef enum sys_record_kind {
  SYS_RECORD_CREATE, /* object, a file, is made as name in dir */
  SYS_RECORD_MKDIR,  /* object, a directory, the same */
  SYS_RECORD_REMOVE, /* name in dir, which was object, is taken away: unlink, rmdir */
  SYS_RECORD_RENAME, /* object is now to in dir, and no longer name */
  SYS_RECORD_SIZE,   /* object has `at` bytes: ftruncate, O_TRUNC */
  SYS_RECORD_WRITE,  /* bytes at `at` of object, from data */
  SYS_RECORD_SYNC,   /* of object, which succeeded */
  SYS_RECORD_MARK    /* `at` is what the test says */
} sys_record_kind;

typedef struct sys_record_entry {
  sys_record_kind kind;
  int32_t rank;
  int32_t object, dir; /* numbers; the recorded directory itself is 0 */
  char name[SYS_RECORD_NAME], to[SYS_RECORD_NAME];
  int64_t at, bytes;
  int64_t data; /* offset */
} sys_record_entry;

typedef struct sys_record { /* in memory that the processes share */
  int32_t lock;
  int32_t n_entries, n_objects;
  int64_t n_data;
  struct {
    uint64_t device, inode;
    bool is_dir;
  } objects[SYS_RECORD_OBJECTS];
  sys_record_entry entries[SYS_RECORD_ENTRIES];
  unsigned char data[];
} sys_record;

/* Of an existing empty directory. */
sys_record *sys_record_create(const char *dir);
void sys_record_destroy(sys_record *record);
void sys_record_install(sys_record *record, int32_t rank); /* this process's table; before use, as sys.h says */
void sys_record_uninstall(void);
void sys_record_mark(sys_record *record, int64_t value);
#endif
