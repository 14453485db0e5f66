//! The kernel's network by netlink: links, addresses, routes and namespaces.
