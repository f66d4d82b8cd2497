// Package index makes and reads the digest index of a disk layer: which blocks
// hold which bytes. With it a page of guest memory gets the name of a block even
// when nobody saw the I/O that brought it there.
//
// An index file holds one entry for each block that is not zero, in the order of
// the blocks, and tables over them:
//
//	offset 0          header, 4096 bytes, see format.go
//	4096              digests  16 bytes an entry, in block order
//	                  runs      8 bytes a run of neighbouring blocks: first block, first entry
//	                  fanout    4 bytes for each prefix of a digest, and one more: first position in order
//	                  order     4 bytes an entry: entries by ascending digest, then block
//	                  filter   32 bytes for each 21 entries: a Bloom filter over XXH3-64
//
// which makes 21.5 bytes for 4096, 0.53 %. Numbers are little-endian, tables
// start at multiples of 64. A page is looked up by its BLAKE3; the filter tells
// from its XXH3-64, ten times faster, that most other pages are not there at
// all.
//
// The header binds the index to its layer: identity by content, size, and the
// file's stamp when it was read. [Index.Check] refuses a layer that changed
// since. What a consumer takes from an index is a hint all the same: it compares
// digests or bytes with what it reads.
//
// [Build] hashes with all cores, keeps what it has in a journal beside the
// index, and goes on from there when it was interrupted. The index appears under
// its name only when it is complete, by rename: a mapped index never changes.
package index
