/* What floor.c and floor.S agree on. */
#define FLOOR_RING 65536
