// Package memmap draws a picture of guest memory: what each page equals, by
// colour, and which large frames are mapped as one, by a frame around them.
//
//	            title, scale, how the data was obtained
//	[] zero           1.2 GiB   30.0 %      [] large   1800  3.5 GiB  87.9 %
//	[] disk.img       1.9 GiB   48.1 %      [] small    200  400 MiB   9.8 %
//	             +0        +8 MiB      +16 MiB
//	0x000000000  [tile] [tile] [tile] [tile] ...                        0
//	0x004000000  [tile] [tile] ...                                 64 MiB
//	             ---- 32-bit hole ----
//	0x100000000  [tile] ...                                         4 GiB
//
// A tile is a large frame, or several when memory is very large. With a class
// for each page it holds a dot for each page, in the order of addresses; with
// counts its dots are shared out among the classes in proportion.
//
// The package takes data and knows nothing of machines. [Map.PNG] and [Map.SVG]
// draw the same shapes, [NewLayout] says where they lie.
package memmap
