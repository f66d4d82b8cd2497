// Package archive moves a snapshot to another machine as one file: the snapshot,
// its ancestors, and the images of all layers that they name.
//
//	Export: DIR, its ancestors, their layers ---> one stream of bytes
//	Import: one stream of bytes ---> FOLDER/NAME          the snapshot
//	                                 FOLDER/PARENT ...    its ancestors
//	                                 FOLDER/layers/*      images, made immutable
//
// An archive is a tar file, compressed by Zstandard, whose first member says what
// follows. docs/snapshot-format.md says what every member means. Whoever has no
// ditto can unpack it with tar.
//
// The snapshots are the same as before, to the last byte, and so are their
// identities. Their layers are found in the folder beside them; images that are
// stacked on others say so anew.
//
// Trust: an archive is hostile. Which members there must be, in which order and
// how large, follows from the first member and the manifests; anything else is
// refused before it is written. No name of a member becomes a path, no image
// leads to a file outside of the folder, and the folder appears when everything
// in it was verified, or not at all.
package archive
