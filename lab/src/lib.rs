//! Several conet hosts on one machine: namespaces, measurements and the demonstration.
