/* A shared object that is not a plugin. */
int phx_stub_nothing(void);
int phx_stub_nothing(void) { return 0; }
