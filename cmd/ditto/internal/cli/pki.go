package cli

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/adrg/xdg"
	"github.com/spf13/cobra"

	"ditto.vm/cmd/ditto/internal/exit"
	"ditto.vm/migration/pki"
)

// day is what lifetimes of certificates are counted in.
const day = 24 * time.Hour

// maxDays bounds the life of a certificate.
const maxDays = 100 * 365

func (e *Env) pkiCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "pki",
		Short: "Make certificates for migrations",
		Long: `Make a small authority, and certificates of it for hosts, for migrations over
networks: both sides show theirs. Who has an authority of their own can use its
certificates instead; they need both server and client authentication.

The files are made in ~/.config/ditto/pki or --dir, for their user only, and never
replace others. Keep ca.key where no machine runs: whoever has it can make a host
that the others believe.`,
		Example: `  ditto pki init
  ditto pki host hosta 10.0.0.1
  ditto pki host hostb hostb.example.org 10.0.0.2
  ditto pki show`,
		GroupID: groupHost,
	}
	cmd.AddCommand(e.pkiInitCommand(), e.pkiHostCommand(), e.pkiShowCommand())
	return cmd
}

// addPKIDir adds the flag for the folder of certificates.
func addPKIDir(cmd *cobra.Command, dir *string) {
	cmd.Flags().StringVar(dir, "dir", filepath.Join("~", ".config", "ditto", "pki"), "`FOLDER` of the authority")
	_ = cmd.MarkFlagDirname("dir")
}

// pkiDir is the folder that the flag means.
func pkiDir(cmd *cobra.Command, dir string) (string, error) {
	if !cmd.Flags().Changed("dir") {
		return filepath.Join(xdg.ConfigHome, "ditto", "pki"), nil
	}
	return filepath.Abs(dir)
}

// pkiError says what to do about files that exist.
func pkiError(err error) error {
	if errors.Is(err, pki.ErrExists) {
		return fmt.Errorf("%w: nothing was changed; remove it yourself, or use another --dir", err)
	}
	return err
}

// life returns how long a certificate is valid.
func life(days int) (time.Duration, error) {
	if days < 1 || days > maxDays {
		return 0, exit.Errorf(exit.Usage, "--days %d is out of range: use 1 to %d", days, maxDays)
	}
	return time.Duration(days) * day, nil
}

func (e *Env) pkiInitCommand() *cobra.Command {
	var dir, name string
	days := int(pki.DefaultCALife / day)
	cmd := &cobra.Command{
		Use:     "init",
		Short:   "Make an authority",
		Long:    "Make an authority: ca.crt, which all hosts get, and ca.key, which signs their\ncertificates.",
		Example: "  ditto pki init\n  ditto pki init --dir /media/stick/pki --name 'our hosts'",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			path, err := pkiDir(cmd, dir)
			if err != nil {
				return err
			}
			valid, err := life(days)
			if err != nil {
				return err
			}
			if err := pki.Init(path, name, valid); err != nil {
				return pkiError(err)
			}
			_, err = fmt.Fprintf(e.Stdout, `made %s and %s
next: make a certificate for each host, with the names and addresses by which the
others reach it:
  ditto pki host HOST [NAME|ADDRESS...]%s
`, filepath.Join(path, pki.CACert), filepath.Join(path, pki.CAKey), dirWords(cmd, path))
			return err
		},
	}
	addPKIDir(cmd, &dir)
	cmd.Flags().StringVar(&name, "name", "ditto", "the authority's `NAME`, for people")
	cmd.Flags().IntVar(&days, "days", days, "how long it is valid")
	return cmd
}

// dirWords is the flag that names a folder, when it is needed.
func dirWords(cmd *cobra.Command, path string) string {
	if !cmd.Flags().Changed("dir") {
		return ""
	}
	return " --dir " + shellQuote([]string{path})
}

func (e *Env) pkiHostCommand() *cobra.Command {
	var dir string
	days := int(pki.DefaultHostLife / day)
	cmd := &cobra.Command{
		Use:   "host HOST [NAME|ADDRESS...]",
		Short: "Make a certificate for a host",
		Long: `Make a certificate for a host: HOST.crt and HOST.key. It is for HOST, and for all
names and addresses that follow: the source of a migration checks that the one in
tcp://HOST:PORT is among them.`,
		Example: "  ditto pki host hosta 10.0.0.1\n  ditto pki host 10.0.0.2 --days 90",
		Args:    cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			path, err := pkiDir(cmd, dir)
			if err != nil {
				return err
			}
			valid, err := life(days)
			if err != nil {
				return err
			}
			cert, key, err := pki.Host(path, args[0], args[1:], valid)
			if err != nil {
				return pkiError(err)
			}
			ca := filepath.Join(path, pki.CACert)
			_, err = fmt.Fprintf(e.Stdout, `made %s and %s
next: bring these two and %s to %s, where only you may read them, and there:
  ditto receive --listen :%s --tls-cert %s --tls-key %s --tls-ca %s
or, to let a machine go from there:
  ditto migrate NAME tcp://OTHER --tls-cert %s --tls-key %s --tls-ca %s
`, cert, key, ca, args[0], DefaultPort,
				filepath.Base(cert), filepath.Base(key), pki.CACert, filepath.Base(cert), filepath.Base(key), pki.CACert)
			return err
		},
	}
	addPKIDir(cmd, &dir)
	cmd.Flags().IntVar(&days, "days", days, "how long it is valid")
	return cmd
}

func (e *Env) pkiShowCommand() *cobra.Command {
	var dir string
	var asJSON bool
	cmd := &cobra.Command{
		Use:     "show [FILE]",
		Short:   "Describe certificates",
		Long:    "Describe the certificate in a file, or all in the folder of the authority.",
		Example: "  ditto pki show\n  ditto pki show hosta.crt --json",
		Args:    cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			path, err := pkiDir(cmd, dir)
			if err != nil {
				return err
			}
			if len(args) > 0 {
				path = args[0]
			} else if !exists(path) {
				return fmt.Errorf("%s does not exist: make an authority with 'ditto pki init'", path)
			}
			certs, err := pki.Show(path)
			if err != nil {
				return err
			}
			if asJSON {
				return e.printJSON(certs)
			}
			return e.printCertificates(certs)
		},
	}
	addPKIDir(cmd, &dir)
	addJSON(cmd, &asJSON)
	return cmd
}

func (e *Env) printCertificates(certs []pki.Certificate) error {
	rows := [][]string{{"FILE", "NAME", "FOR", "SIGNED BY", "VALID UNTIL", "SHA-256"}}
	for _, c := range certs {
		use := strings.Join(c.Hosts, " ")
		if c.Authority {
			use = "signing"
		}
		until := c.Until.Local().Format(time.DateOnly)
		if now := time.Now(); now.After(c.Until) || now.Before(c.From) {
			until += " (not valid now)"
		}
		rows = append(rows, []string{filepath.Base(c.Path), c.Name, use, c.Issuer, until, c.Fingerprint[:16]})
	}
	return e.table(rows)
}

// tlsFlags are the flags of both sides of a migration.
type tlsFlags struct {
	cert, key, ca string
	insecure      bool
}

func (f *tlsFlags) add(cmd *cobra.Command) {
	fs := cmd.Flags()
	fs.StringVar(&f.cert, "tls-cert", "", "this host's certificate, a PEM `FILE` (ditto pki host)")
	fs.StringVar(&f.key, "tls-key", "", "its private key, a PEM `FILE`")
	fs.StringVar(&f.ca, "tls-ca", "", "the authority that the other side's certificate must be of, a PEM `FILE`")
	fs.BoolVar(&f.insecure, "insecure", false, "allow connections over networks without TLS: everybody on the way can read and change the machine")
	cmd.MarkFlagsRequiredTogether("tls-cert", "tls-key", "tls-ca")
	cmd.MarkFlagsMutuallyExclusive("tls-cert", "insecure")
	for _, name := range []string{"tls-cert", "tls-key", "tls-ca"} {
		_ = cmd.MarkFlagFilename(name, "pem", "crt", "key")
	}
}

// load returns the credentials, nil if there are none.
func (f *tlsFlags) load() (*pki.Credentials, error) {
	if f.cert == "" {
		return nil, nil
	}
	c, err := pki.Load(f.cert, f.key, f.ca)
	if err != nil {
		if os.IsNotExist(err) {
			err = fmt.Errorf("%w: 'ditto pki host' makes one", err)
		}
		return nil, exit.New(exit.Usage, err)
	}
	return &c, nil
}
