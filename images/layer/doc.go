// Package layer gives disk layers an identity and a way to notice that one was
// changed.
//
// A layer is one immutable or exclusively written disk image in a backing
// chain; what counts is what a guest reads from it, not how a file stores it. A
// name of a guest page is (layer identity, block), so the identity must be the
// same wherever the same bytes are, and must never be the same for different
// bytes. The two kinds of layer need two kinds of identity:
//
//	immutable   derived from the content: the root of a tree over the digests
//	            of all blocks. Two hosts that hold the same base image, however
//	            they got it, agree on it without asking each other.
//	written     a random UUID for as long as one VM writes it. Its content has
//	            no digest that would stay true, so the UUID is drawn anew at
//	            each opening for writing and names made before die with it.
//	            When the layer is frozen under an overlay, the snapshot's
//	            manifest keeps the UUID; indexing it then gives it an identity
//	            by content as well.
//
// Both are 16 bytes in the form of a UUID (RFC 9562): version 8 is content,
// version 4 is random, so that the kinds can neither collide nor be confused.
//
// The content identity is
//
//	digest(block) = first 16 bytes of BLAKE3(4096 bytes); all zeros for a zero block
//	leaf(chunk)   = first 16 bytes of BLAKE3(digests of its 1024 blocks)
//	identity      = first 16 bytes of BLAKE3(label, size, leaf 0, leaf 1, ..., tail)
//
// where missing blocks of the last chunk count as zero blocks, and tail is the
// BLAKE3 of the last bytes that fill no block, if any. A chunk of zeros
// has a constant leaf, so that a sparse layer costs little.
package layer
