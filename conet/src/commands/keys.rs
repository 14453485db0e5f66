//! `conet keygen` and `conet pubkey`.

use std::io::{self, Read};

use anyhow::{Context, Result};
use conet_node::identity::Identity;
use zeroize::Zeroizing;

use crate::table;

/// Most bytes of standard input that may be a key: one line.
const MAX_INPUT: u64 = 256;

pub(super) fn keygen() -> Result<()> {
    let identity = Identity::generate().context("the kernel gives no random numbers")?;
    table::line(&identity.seed_base64())?;
    Ok(())
}

pub(super) fn pubkey(wireguard: bool) -> Result<()> {
    let mut text = Zeroizing::new(String::new());
    io::stdin()
        .lock()
        .take(MAX_INPUT)
        .read_to_string(&mut text)
        .context("no key on standard input; give the one that `conet keygen` printed")?;
    let identity: Identity = text
        .parse()
        .map_err(|error| anyhow::anyhow!("standard input is not a private key: {error}"))?;
    let public = identity.public();
    let shown = if wireguard { public.x25519().to_string() } else { public.to_string() };
    table::line(&shown)?;
    Ok(())
}
