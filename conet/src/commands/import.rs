//! `conet import`: a `conet.toml` from a file of `wg-quick`'s.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use conet_node::config::Config;
use conet_node::identity::Identity;
use conet_node::wgquick::{self, NodeChoice};
use serde_json::json;
use zeroize::Zeroizing;

use crate::cli::ImportOptions;
use crate::table;

/// Longest file that is read: 10,000 peers with ten prefixes each fit.
const MAX_BYTES: u64 = 8 << 20;

pub(super) fn import(from: &Path, options: ImportOptions) -> Result<()> {
    let shown = from.display();
    let read = || -> std::io::Result<(Zeroizing<String>, u32)> {
        let file = File::open(from)?;
        let mode = file.metadata()?.permissions().mode() & 0o777;
        let mut text = Zeroizing::new(String::new());
        file.take(MAX_BYTES).read_to_string(&mut text)?;
        Ok((text, mode))
    };
    let (text, mode) = read().map_err(|error| anyhow!("cannot read {shown}: {error}"))?;
    let parsed = wgquick::parse(&text).map_err(|error| anyhow!("{shown}: {error}"))?;
    let Some(overlay) = options.overlay.or_else(|| parsed.overlay()) else {
        bail!(
            "{shown}: Address is not the first of a network, which guests could share; \
             give the guests' prefix, as in --overlay 10.77.1.0/24"
        );
    };
    let choice = NodeChoice { address: options.address, overlay, name: options.name };
    let identity = Identity::generate().context("the kernel gives no random numbers")?;
    let text = parsed.to_toml(&identity, &choice);
    write(&options.to, &text)?;
    if mode & 0o077 != 0 {
        eprintln!("conet: others can read the secrets in {shown}; run: chmod 600 {shown}");
    }
    let (to, peers) = (options.to.display().to_string(), parsed.peers.len());
    if options.output.json {
        let public_key = identity.public().to_string();
        let answer = json!({ "file": to, "peers": peers, "public_key": public_key });
        return Ok(table::json(&answer)?);
    }
    Ok(table::line(&format!("{to}: {peers} peers; start it with: conet up -c {to}"))?)
}

/// Writes the file where there is none, if a daemon would take it: at once and whole,
/// readable by its owner alone.
fn write(to: &Path, text: &str) -> Result<()> {
    let shown = to.display();
    let mut next = to.as_os_str().to_owned();
    next.push(format!(".{}", std::process::id()));
    let next = Path::new(&next);
    let written = (|| -> Result<()> {
        let mut file = OpenOptions::new().create_new(true).write(true).mode(0o600).open(next)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        if let Err(error) = Config::load(next) {
            // Of a file that is not to be: its place helps nobody.
            let said = error.to_string();
            let said = said.splitn(3, ':').nth(2).unwrap_or_default().trim();
            bail!("what it comes to is refused: {said}");
        }
        // Fails where there is a file, which renaming would replace.
        match fs::hard_link(next, to) {
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                bail!("it is there already; name another with --to, or remove it")
            }
            other => Ok(other?),
        }
    })();
    if let Err(error) = fs::remove_file(next)
        && written.is_ok()
    {
        bail!("cannot remove {} ({error}), which holds the same secrets", next.display());
    }
    written.map_err(|error| anyhow!("cannot write {shown}: {error}"))
}
