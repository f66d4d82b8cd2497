package debian

// Codename is the Debian release whose packages ditto uses.
const Codename = codename

// SourcesPath is the deb822 file that names the mirror and suites of the
// private configuration, for tools that take one, such as mmdebstrap.
func (a *Archive) SourcesPath() string { return a.path("sources", "debian.sources") }
