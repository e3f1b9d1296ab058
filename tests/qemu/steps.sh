# shellcheck shell=bash
# shellcheck disable=SC2154 # source and here are set in `environment` and `arm64`
# The steps of `environment`, in order. Each fills the directory that it is given, and may read
# what earlier steps made. No version is fixed here: each step takes what Debian has today. Only
# where QEMU's newest source cannot be downloaded is one named.

cache=${XDG_CACHE_HOME:-$HOME/.cache}/vhost-user-timer/qemu
# Mounting takes root, or a user namespace in which this user is root.
namespace=()
((EUID == 0)) || namespace=(--map-root-user)

suite=trixie
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
# The flavour with the fewest drivers: the smallest image, and the first to boot.
flavour=cloud-arm64
cross=aarch64-linux-gnu-

# hosts_apt ARGUMENT…: runs the host's apt-get, when no other apt holds its locks. One that updates
# the machine may hold them for minutes.
hosts_apt() {
    local said limit=$((SECONDS + 600))
    until said=$(LC_ALL=C apt-get -q "$@" 2>&1); do
        if [[ $said != *'Could not get lock'* ]] || ((SECONDS > limit)); then
            printf '%s\n' "$said"
            return 1
        fi
        sleep 2
    done
    printf '%s\n' "$said"
}

# The Debian mirror in the lists of the host's apt, if any.
apts_mirror() {
    # shellcheck disable=SC2016 # apt expands it
    apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Label: Debian' | sed 1q
}

# The Debian mirror to use.
mirror() {
    local mirror=${VHOST_USER_TIMER_MIRROR:-}
    [[ -n $mirror ]] || mirror=$(apts_mirror) || true
    # A new machine may have no lists yet.
    if [[ -z $mirror && $EUID -eq 0 ]] && hosts_apt update >&2; then
        mirror=$(apts_mirror) || true
    fi
    [[ -n $mirror ]] || {
        echo 'apt names no Debian mirror here: set VHOST_USER_TIMER_MIRROR to the address of one.'
        return 1
    }
    printf '%s\n' "$mirror"
}

# debian OPTIONS… -- DIRECTORY: makes a Debian root, with OPTIONS for mmdebstrap. Packages that
# backports has are taken from there: the kernel, QEMU and rustc have to be.
debian() {
    local options=() mirror proxy line pins="Package: *\nPin: release n=$suite-backports\nPin-Priority: 500\n"
    while [[ $1 != -- ]]; do
        options+=("$1")
        shift
    done
    mirror=$(mirror)
    proxy=$(apt-config dump --format '%f "%v";%n' Acquire::http::Proxy Acquire::https::Proxy 2>/dev/null) || true
    if [[ -n $proxy ]]; then
        while read -r line; do options+=("--aptopt=$line"); done <<<"$proxy"
    fi
    options+=(
        --keyring="$keyring"
        --aptopt='APT::Install-Recommends "false"'
        # The root is used in a namespace with one user, so apt cannot change to another.
        --aptopt='APT::Sandbox::User "root"'
        --setup-hook="printf '$pins' >\"\$1/etc/apt/preferences.d/backports\""
        --dpkgopt='path-exclude=/usr/share/doc/*'
        --dpkgopt='path-exclude=/usr/share/man/*'
        --dpkgopt='path-exclude=/usr/share/locale/*'
    )
    local sources=("deb $mirror $suite main" "deb $mirror $suite-backports main")
    if ((EUID == 0)); then
        # In a mount namespace, so that a killed mmdebstrap leaves no mounts.
        unshare --mount mmdebstrap --mode=root --format=directory "${options[@]}" "$suite" "$2" "${sources[@]}"
    else
        # Through an archive, so that the user owns all files and can remove them.
        mmdebstrap --mode=unshare --format=tar "${options[@]}" "$suite" - "${sources[@]}" |
            tar -x -C "$2" --exclude='./dev/*' --no-same-owner
    fi
}

# in_tools FROM:TO… -- COMMAND…: runs COMMAND in the tools' root, with FROM mounted at TO. The
# mounts are in their own namespace and end with it.
in_tools() {
    # shellcheck disable=SC2016 # expanded inside
    unshare "${namespace[@]}" --mount bash -euc '
        root=$1; shift
        touch "$root/etc/resolv.conf"
        mkdir -p "$root/proc" "$root/dev"
        mount --bind "$(realpath /etc/resolv.conf)" "$root/etc/resolv.conf"
        mount --rbind /proc "$root/proc"
        mount --rbind /dev "$root/dev"
        while [[ $1 != -- ]]; do
            mkdir -p "$root/${1#*:}"
            mount --bind "${1%%:*}" "$root/${1#*:}"
            shift
        done
        shift
        # Nothing of what make, cargo and their user have set for themselves.
        exec env -i PATH=/usr/sbin:/usr/bin HOME=/root LC_ALL=C DEBIAN_FRONTEND=noninteractive \
            ${http_proxy:+http_proxy="$http_proxy"} ${https_proxy:+https_proxy="$https_proxy"} \
            chroot "$root" "$@"
    ' in_tools "$cache/tools" "$@"
}

# The same in the root where QEMU is built. It is a root of its own, so that a package more there
# repeats nothing else.
in_builder() {
    local cache=$cache/builder
    in_tools "$@"
}

make_tools() {
    debian --variant=apt --architectures=amd64,arm64 \
        --include=qemu-system-arm,gcc-aarch64-linux-gnu,make,pahole,kmod,cpio,xz-utils \
        --include=rustc,cargo,libstd-rust-dev:arm64,libc6-dev:arm64 \
        -- "$1"
    local version
    version=$(run_qemu "$1" --version | sed -n 's/^QEMU emulator version \([0-9.]*\).*/\1/p')
    printf '11.1\n%s\n' "$version" | sort -V -C || {
        echo "QEMU 11.1 or newer is needed, for vhost-user-rtc, and this is $version."
        return 1
    }
}

# run_qemu ROOT …: runs the QEMU of ROOT outside of it, with its own loader and libraries.
run_qemu() {
    local root=$1
    shift
    "$root/lib64/ld-linux-x86-64.so.2" --library-path "$root/usr/lib/x86_64-linux-gnu" \
        "$root/usr/bin/qemu-system-aarch64" -L "$root/usr/share/qemu" "$@"
}

# Extracted, not installed: none of it has to run here.
make_userland() {
    debian --variant=extract --architectures=arm64 --include=busybox-static,chrony -- "$1"
}

make_kernel() {
    # shellcheck disable=SC2016 # expanded inside
    in_tools "$1:/mnt" -- bash -euo pipefail -c '
        flavour=$1
        cd /mnt
        apt-get -q update
        dependency() { apt-cache depends "$1" | sed -n "s/^ *Depends: \($2[^:]*\)\(:.*\)\?$/\1/p" | sed 1q; }
        version() { apt-cache show --no-all-versions "$1" | sed -n "s/^Version: //p"; }

        release=$(dependency "linux-image-$flavour:arm64" linux-image-)
        release=${release#linux-image-}
        abi=${release%-"$flavour"}
        version=$(version "linux-image-$flavour:arm64")
        source=$(dependency linux-source linux-source-)
        [[ -n $release && $(version linux-source) == "$version" ]] || {
            echo "The kernel is $version and the kernel source $(version linux-source): they must be the same."
            exit 1
        }
        echo "kernel $release, version $version"

        mkdir packages
        (cd packages && apt-get -q download \
            "linux-binary-$release:arm64=$version" "linux-modules-$release:arm64=$version" \
            "linux-headers-$release:arm64=$version" "linux-headers-$abi-common=$version" \
            "linux-kbuild-$abi:amd64=$version" "$source=$version")
        for package in packages/*.deb; do dpkg-deb -x "$package" .; done
        tar -xf "usr/src/$source.tar.xz" --strip-components=3 --wildcards "*/drivers/virtio/virtio_rtc*" || {
            echo "There is no virtio_rtc in Linux $version: it came with 6.16."
            exit 1
        }
        echo "$release" >release
        rm -r packages "usr/src/$source.tar.xz"
        apt-get clean
        rm -rf /var/lib/apt/lists/*
    ' bash "$flavour"
}

# Debian 12's kernel, from before KVM had an ioctl for the counter's offset, and the modules by
# which this kernel reaches the test.
make_bookworm() {
    # shellcheck disable=SC2016 # expanded inside
    in_tools "$1:/mnt" -- bash -euo pipefail -c '
        flavour=$1
        cd /mnt
        mkdir -p apt/lists/partial tree/lib/modules
        printf "deb %s bookworm main\n" "$2" >apt/sources
        apt=(-o Dir::Etc::SourceList=/mnt/apt/sources -o Dir::Etc::SourceParts=-
            -o Dir::State::Lists=/mnt/apt/lists -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache=)
        apt-get -q "${apt[@]}" update
        package=$(apt-cache "${apt[@]}" depends "linux-image-$flavour:arm64" |
            sed -n "s/^ *Depends: \(linux-image-[^:]*\)\(:.*\)\?$/\1/p" | sed 1q)
        release=${package#linux-image-}
        echo "kernel $release"
        apt-get -q "${apt[@]}" download "$package:arm64"
        dpkg-deb -x "$package"_*.deb package
        mv "package/boot/vmlinuz-$release" Image

        mkdir "tree/lib/modules/$release"
        for module in virtio virtio_ring virtio_pci virtio_pci_modern_dev virtio_pci_legacy_dev virtio_console; do
            find package/lib/modules -name "$module.ko" -exec mv -t "tree/lib/modules/$release" {} +
        done
        depmod -b tree "$release"
        rm -r apt package ./*.deb
    ' bash "$flavour" "$(mirror)"
    archive "$1" tree modules.cpio
}

# A warning is an error, whether from the compiler (-Werror) or about a missing symbol.
make_module() {
    local release
    release=$(<"$cache/kernel/release")
    cp "$cache"/kernel/virtio_rtc* "$1"
    cat >"$1/Kbuild" <<'KBUILD'
obj-m := virtio_rtc.o
virtio_rtc-y := virtio_rtc_driver.o virtio_rtc_ptp.o virtio_rtc_arm.o virtio_rtc_class.o
ccflags-y := -DCONFIG_VIRTIO_RTC_PTP=1 -DCONFIG_VIRTIO_RTC_ARM=1 -DCONFIG_VIRTIO_RTC_CLASS=1 -Werror
KBUILD
    in_tools "$1:/mnt" "$cache/kernel/usr/src:/usr/src" \
        "$cache/kernel/usr/lib/linux-kbuild-${release%-"$flavour"}:/usr/lib/linux-kbuild-${release%-"$flavour"}" -- \
        make -C "/usr/src/linux-headers-$release" M=/mnt ARCH=arm64 CROSS_COMPILE="$cross" modules 2>&1 |
        tee "$1/build.log"
    if grep -i warning "$1/build.log"; then
        echo 'A warning is an error here.'
        return 1
    fi
    [[ -s $1/virtio_rtc.ko ]]
}

# QEMU's user-mode emulator, which runs arm64 programs on this machine. It is one static program.
make_emulator() {
    in_tools "$1:/mnt" -- bash -euo pipefail -c '
        cd /mnt
        apt-get -q update
        apt-get -q download qemu-user
        dpkg-deb --fsys-tarfile qemu-user_*.deb | tar -x --strip-components=3 ./usr/bin/qemu-aarch64
        rm qemu-user_*.deb
        apt-get clean
        rm -rf /var/lib/apt/lists/*
    '
    "$1/qemu-aarch64" --version
}

# Prepares $cache/arm64, where cargo builds for arm64. Cargo removes nothing there, and each copy of
# the source, each compiler and each version of a crate has files of its own. So past this size all
# of it is removed, and built again, unless another run uses it.
use_arm64() {
    local size limit=3072 # MiB
    exec 8>>"$cache/arm64.used"
    if [[ -d $cache/arm64 ]] && flock --exclusive --nonblock 8; then
        size=$(du -sm "$cache/arm64" | cut -f1)
        if ((size > limit)); then
            echo "removing $cache/arm64, which has grown to $size MiB" >&2
            rm -rf "$cache/arm64"
        fi
    fi
    # Until this shell ends.
    flock --shared 8
    mkdir -p "$cache/arm64"
}

# arm64_cargo TARGET FROM:TO… -- COMMAND…: runs COMMAND in the tools' root, where cargo builds the
# source for arm64 into TARGET, with Debian's compiler and the crates that the host's cargo has. The
# source has the same path as outside, because test programs find their data by it.
arm64_cargo() {
    local target=$1 mounts=()
    shift
    while [[ $1 != -- ]]; do
        mounts+=("$1")
        shift
    done
    shift
    cargo fetch --locked --manifest-path "$source/Cargo.toml"
    in_tools "$source:$source" "$target:/mnt/target" "${CARGO_HOME:-$HOME/.cargo}/registry:/mnt/cargo/registry" \
        "${mounts[@]}" -- env --chdir="$source" \
        CARGO_HOME=/mnt/cargo CARGO_TARGET_DIR=/mnt/target CARGO_NET_OFFLINE=true CARGO_INCREMENTAL=0 \
        CARGO_BUILD_TARGET=aarch64-unknown-linux-gnu \
        CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER="${cross}gcc" \
        CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUSTFLAGS='-C target-feature=+crt-static -D warnings' \
        "$@"
}

# Waits until no other run builds programs in $cache/arm64 or runs them there: those of another copy
# of the source have the same paths. Others wait until this shell ends.
lock_arm64() {
    exec 9>"$cache/arm64.lock"
    flock --nonblock 9 || {
        echo "another run uses $cache/arm64; waiting until it ends" >&2
        flock 9
    }
}

# arm64_programs OPTION…: builds the programs that OPTIONs name, for machines that tests boot: as
# released, but without link-time optimization, which is slow, program by program.
arm64_programs() {
    use_arm64
    lock_arm64
    arm64_cargo "$cache/arm64" -- env CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_CODEGEN_UNITS=16 \
        cargo build --locked --release --quiet "$@" >&2
}

make_program() {
    use_arm64
    arm64_cargo "$cache/arm64" -- cargo build --locked --release --package vhost-user-timer-guest
    cp "$cache/arm64/aarch64-unknown-linux-gnu/release/vhost-user-timer-guest" "$1/guest"
}

make_image() {
    local release tree=$1/tree module modules
    release=$(<"$cache/kernel/release")
    modules=lib/modules/$release
    cp "$cache/kernel/usr/lib/modules/$release/vmlinuz" "$1/Image"
    cp "$cache/bookworm/Image" "$1/Image-bookworm"
    cp "$cache/bookworm/modules.cpio" "$1/guest-bookworm.cpio"

    # Uncompressed, as TCG is slow and disks are not.
    mkdir -p "$tree"/{bin,dev,proc,sys,run,tmp,"$modules"}
    cp "$here/initramfs/init" "$tree/init"
    cp "$cache/userland/usr/bin/busybox" "$tree/bin/busybox"
    cp "$cache/program/guest" "$tree/bin/guest"
    chmod 755 "$tree/init" "$tree"/bin/*
    for module in virtio_mmio rng-core virtio-rng; do
        find "$cache/kernel/usr/lib/modules/$release" -name "$module.ko.xz" -exec cp -t "$tree/$modules" {} +
    done
    find "$tree/$modules" -name '*.xz' -exec xz -d {} +
    cp "$cache/module/virtio_rtc.ko" "$tree/$modules"
    in_tools "$1:/mnt" -- depmod -b /mnt/tree "$release"
    archive "$1" tree guest.cpio

    mkdir -p "$1"/chrony/{bin,etc,run/chrony,var/lib/chrony}
    # As chronyd wants it.
    chmod 750 "$1/chrony/run/chrony"
    ln -s /run "$1/chrony/var/run"
    echo 'root:x:0:0::/:/bin/sh' >"$1/chrony/etc/passwd"
    cp "$cache"/userland/usr/sbin/chronyd "$cache"/userland/usr/bin/chronyc "$1/chrony/bin"
    local file
    for file in chronyd chronyc; do add_libraries "$1/chrony" "$1/chrony/bin/$file"; done
    archive "$1" chrony guest-chrony.cpio

    cat >"$1/qemu-system-aarch64" <<WRAPPER
#!/bin/sh
root='$cache/tools'
QEMU_MODULE_DIR=\$root/usr/lib/x86_64-linux-gnu/qemu
export QEMU_MODULE_DIR
exec "\$root/lib64/ld-linux-x86-64.so.2" --library-path "\$root/usr/lib/x86_64-linux-gnu" \\
    "\$root/usr/bin/qemu-system-aarch64" -L "\$root/usr/share/qemu" "\$@"
WRAPPER
    chmod 755 "$1/qemu-system-aarch64"
    local devices device
    devices=$("$1/qemu-system-aarch64" -device help)
    for device in vhost-user-rtc vhost-user-rtc-pci vhost-user-test-device; do
        grep -q "^name \"$device\"" <<<"$devices" || {
            echo "This QEMU has no device $device."
            return 1
        }
    done
}

# archive DIRECTORY TREE NAME: makes DIRECTORY/TREE the initramfs DIRECTORY/NAME.
archive() {
    # shellcheck disable=SC2016 # expanded inside
    in_tools "$1:/mnt" -- bash -euo pipefail -c '
        cd "/mnt/$1"
        find . -print0 | sort -z | cpio --null --create --format=newc --owner=0:0 --quiet >"/mnt/$2"
    ' bash "$2" "$3"
    rm -r "${1:?}/$2"
}

# add_libraries TREE FILE [ROOT]: copies the libraries that FILE needs from ROOT into TREE, and
# those that they need.
add_libraries() {
    local name from to root=${3:-$cache/userland}
    for name in $("$cache/tools/lib64/ld-linux-x86-64.so.2" --library-path "$cache/tools/usr/lib/x86_64-linux-gnu" \
        "$cache/tools/usr/bin/${cross}readelf" -dl "$2" |
        sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p; s/.*program interpreter: .*\/\(.*\)\]/\1/p'); do
        to=$1/lib/$name
        [[ ! -e $to ]] || continue
        from=$root/usr/lib/aarch64-linux-gnu/$name
        [[ -e $from ]] || {
            echo "$2 needs $name, which is not in $(dirname "$from")."
            return 1
        }
        mkdir -p "$1/lib"
        cp -L "$from" "$to"
        add_libraries "$1" "$to" "$root"
    done
}

# What the Debian package is installed in: nothing but apt, and what a host of VMs has.
make_bare() { debian --variant=apt -- "$1"; }
make_host() {
    debian --variant=apt \
        --include=apparmor,man-db,systemd,libvirt-clients,libvirt-daemon-driver-qemu,virtiofsd -- "$1"
}

# A Debian for arm64 with systemd as its first process, and two users, as an initramfs. Extracted,
# not installed, as in `userland`. What the tests do not need is left out, as the boot takes long.
make_system() {
    local tree=$1/tree/system machine=$source/tests/system/machine link
    mkdir -p "$tree"
    debian --variant=extract --architectures=arm64 \
        --include=systemd,apparmor,busybox-static,mount,netcat-openbsd -- "$tree"
    for link in bin sbin lib; do ln -s "usr/$link" "$tree/$link"; done
    mkdir -p "$tree"/{proc,sys,run,root}
    find "$tree"/{usr/lib/systemd/system-generators,etc/apparmor.d} -maxdepth 1 -type f -delete
    find "$tree"/usr/lib/systemd/system/{sysinit,sockets,multi-user,timers}.target.wants -type l \
        ! -name 'systemd-journald*' ! -name systemd-tmpfiles-setup.service -delete
    find "$tree/usr/share" -mindepth 1 -maxdepth 1 ! -name 'apparmor*' -exec rm -r {} +
    rm -rf "$tree"/usr/lib/aarch64-linux-gnu/{gconv,perl*,engines-3,ossl-modules} "$tree"/var/lib/dpkg \
        "$tree"/etc/{fstab,resolv.conf}
    echo 'ID=debian' >"$tree/usr/lib/os-release"
    echo 0123456789abcdef0123456789abcdef >"$tree/etc/machine-id"
    printf '%s: files\n' passwd group >"$tree/etc/nsswitch.conf"
    cp "$machine"/{passwd,group} "$tree/etc"
    cp "$machine"/{commands.service,test.target} "$tree/etc/systemd/system"
    ln -s test.target "$tree/etc/systemd/system/default.target"
    cp "$machine/system-init" "$1/tree"
    archive "$1" tree system.cpio
}

# What builds QEMU, for this machine and for arm64.
make_builder() {
    debian --variant=apt --architectures=amd64,arm64 \
        --include=dpkg-dev,gcc,libc6-dev,meson,ninja-build,patch,pkgconf,xz-utils \
        --include=python3-{distlib,pip,pycotap,qemu-qmp,venv,wheel} \
        --include=libfdt-dev,libglib2.0-dev,libseccomp-dev,zlib1g-dev \
        --include=gcc-aarch64-linux-gnu,libc6-dev:arm64,libfdt-dev:arm64,libglib2.0-dev:arm64,zlib1g-dev:arm64 \
        -- "$1/tools"
}

# fetch_source DIRECTORY SUITE: unpacks a suite's source of QEMU as DIRECTORY/source, without its
# firmware, which is two thirds of it. Fails where there is none, or where it cannot be downloaded:
# a mirror's list of sources can be older than its files. DIRECTORY/version is what the list says,
# in both cases.
fetch_source() {
    # shellcheck disable=SC2016 # expanded inside
    in_builder "$1:/mnt" -- bash -euo pipefail -c '
        cd /mnt
        mkdir -p apt/lists/partial
        trap "rm -rf apt qemu_*" EXIT
        printf "deb-src %s %s main\n" "$1" "$2" >apt/sources
        apt=(-o Dir::Etc::SourceList=/mnt/apt/sources -o Dir::Etc::SourceParts=-
            -o Dir::State::Lists=/mnt/apt/lists -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache=)
        apt-get -q "${apt[@]}" update
        version=$(apt-cache "${apt[@]}" madison qemu | sed -n "s/^ *qemu | *\([^ ]*\) .*/\1/p" | sed 1q)
        echo "QEMU ${version:-(none)} of $2" >version
        apt-get -q "${apt[@]}" source --download-only "qemu=$version"
        dpkg-source --no-check -x qemu_*.dsc source
        rm -r source/roms/*
    ' bash "$(mirror)" "$2"
}

# fetch_pool DIRECTORY VERSION SHA256: the same for a version of which no list says anything, and
# whose .dsc file has this hash. A mirror's pool keeps files for some time after its lists name
# newer ones.
fetch_pool() {
    # shellcheck disable=SC2016 # expanded inside
    in_builder "$1:/mnt" -- bash -euo pipefail -c '
        cd /mnt
        trap "rm -f qemu_*" EXIT
        echo "QEMU $2 of the pool" >version
        # download HASH SIZE NAME
        download() { /usr/lib/apt/apt-helper download-file "$pool/$3" "$3" "SHA256:$1"; }
        pool=${1%/}/pool/main/q/qemu
        download "$3" "" "qemu_$2.dsc"
        sed -n "/^Checksums-Sha256:/,/^Files:/s/^ //p" "qemu_$2.dsc" >qemu_files
        while read -r file; do download $file; done <qemu_files
        dpkg-source --no-check -x "qemu_$2.dsc" source
        rm -r source/roms/*
    ' bash "$(mirror)" "$2" "$3"
}

# QEMU's newest source that can be had.
make_source() {
    local passed_over=
    if ! fetch_source "$1" "$suite-backports"; then
        passed_over="; the source of $(<"$1/version") cannot be downloaded"
        if ! fetch_pool "$1" 11.1.1+ds-1 dfd4fbdd38517e2467002091bbcd938bbff8b2c851cc3f56b019236c7d1f21da; then
            passed_over+=", nor that of $(<"$1/version")"
            fetch_source "$1" "$suite"
        fi
    fi
    echo "$(<"$1/version")$passed_over" | tee "$1/origin"
}

# in_build DIRECTORY COMMAND…: runs COMMAND where DIRECTORY/source is /src, DIRECTORY/build is
# /build and DIRECTORY/local is /usr/local. The paths are always the same, so a copy of a build is
# current.
in_build() {
    local directory=$1
    shift
    mkdir -p "$directory"/{build,local}
    in_builder "$directory/source:/src" "$directory/build:/build" "$directory/local:/usr/local" -- \
        env --chdir=/build "$@"
}

# The devices that the patches add, in some versions.
ours=(VHOST_USER_{RTC,TIMER})

# configure_qemu DIRECTORY OPTION…: configures a small QEMU, with OPTIONs besides. Nothing in it
# uses CXL, but it does not link without.
configure_qemu() {
    local directory=$1
    shift
    printf 'CONFIG_%s=y\n' ARM_VIRT VIRTIO_{PCI,BLK,RNG,SERIAL} PCIE_PORT PXB CXL{,_MEM_DEVICE} "${ours[@]}" \
        >"$directory/source/configs/devices/aarch64-softmmu/tests.mak"
    in_build "$directory" /src/configure --target-list=aarch64-softmmu --without-default-features \
        --without-default-devices --with-devices-aarch64=tests --enable-fdt=system --enable-vhost-user \
        --disable-debug-info --disable-docs --disable-guest-agent --disable-install-blobs --disable-pixman --disable-tools "$@"
}

# The slow part of `patched`, apart from what changes often. It has our names from the start: with a
# name more, almost everything would be built again.
make_unpatched() {
    local name
    cp -a "$cache/source/source" "$1"
    for name in "${ours[@]}"; do
        grep -rqsx "config $name" "$1/source/hw" --include=Kconfig ||
            printf 'config %s\n    bool\n' "$name" >>"$1/source/Kconfig"
    done
    configure_qemu "$1" --enable-tcg --enable-seccomp
    in_build "$1" ninja qemu-system-aarch64
}

# patch_qemu DIRECTORY LIBRARY: puts the device into DIRECTORY/source, and the library that it is
# linked with into DIRECTORY/local. The compiler searches there without Cflags. With them, the
# commands of all the target's files would change, and all would be built again.
patch_qemu() {
    mkdir -p "$1"/local/{include,lib/pkgconfig}
    cp "$2" "$1/local/lib"
    cp "$source/contrib/capi/include/vhost_user_timer.h" "$1/local/include"
    sed 's|@PREFIX@|/usr/local|; s|@LIBDIR@|/usr/local/lib|; s|@VERSION@|0|; /^Cflags:/d' \
        "$source/contrib/capi/vhost-user-timer.pc.in" >"$1/local/lib/pkgconfig/vhost-user-timer.pc"
    in_builder "$1/source:/src" "$source/contrib/qemu:/contrib" -- /contrib/apply /src
}

# The library is one of this day, to link with. What runs QEMU names the one to run with.
make_patched() {
    local library=libvhost_user_timer.so
    CARGO_TARGET_DIR=$cache/library CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_CODEGEN_UNITS=16 \
        cargo build --locked --release --manifest-path "$source/Cargo.toml" --package vhost-user-timer-capi --lib
    cp "$cache/library/release/$library" "$1"
    cp -a "$cache"/unpatched/{source,build} "$1"
    # Without our names, which the patches add too.
    cp "$cache/source/source/Kconfig" "$1/source"
    patch_qemu "$1" "$1/$library"
    # Not its configure, after which everything is built again.
    in_build "$1" pyvenv/bin/meson setup --reconfigure -Dvhost_user_timer=enabled /src
    in_build "$1" ninja qemu-system-aarch64
    mv "$1/build/qemu-system-aarch64" "$1/program"
    rm -r "$1"/{build,local,source}

    cat >"$1/qemu-system-aarch64" <<WRAPPER
#!/bin/sh
# VHOST_USER_TIMER_LIB: the directory of the $library to run with.
root='$cache/builder/tools'
exec "\$root/lib64/ld-linux-x86-64.so.2" --library-path "\$root/usr/lib/x86_64-linux-gnu" \\
    --preload "\${VHOST_USER_TIMER_LIB:-$cache/patched}/$library" '$cache/patched/program' "\$@"
WRAPPER
    chmod 755 "$1/qemu-system-aarch64"
}

# Whether the device compiles in Debian's own QEMU as well, where what the tests run is newer.
make_second() {
    if [[ $(<"$cache/source/version") == *" of $suite" ]]; then
        echo 'not checked: a second version of QEMU' >"$1/report"
        return
    fi
    fetch_source "$1" "$suite"
    compile_device "$1"
    echo "compiled with $(<"$1/version") as well" >"$1/report"
    rm -r "$1"/{build,local,source}
}

# compile_device DIRECTORY: compiles the device, and nothing else, in DIRECTORY/source.
compile_device() {
    patch_qemu "$1" "$cache/library/release/libvhost_user_timer.so"
    configure_qemu "$1" --enable-tcg --enable-vhost-user-timer
    # shellcheck disable=SC2016 # expanded inside
    in_build "$1" bash -euo pipefail -c '
        objects=$(ninja -t targets all | sed -n "s/^\(.*vhost-user-\(timer\|rtc\|rtc-pci\)\.c\.o\): .*/\1/p")
        [[ $objects == *vhost-user-timer* ]]
        ninja $objects
    '
}

# Builds the library for arm64, and prints its path. It is not static as the other programs there,
# and so it has a place of its own.
arm64_library() {
    mkdir -p "$cache/arm64-shared"
    arm64_cargo "$cache/arm64-shared" -- env CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUSTFLAGS='-D warnings' \
        CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_CODEGEN_UNITS=16 \
        cargo build --locked --release --package vhost-user-timer-capi --lib >&2
    echo "$cache/arm64-shared/aarch64-unknown-linux-gnu/release/libvhost_user_timer.so"
}

# QEMU with our device for arm64, with KVM and without TCG.
make_kvm_qemu() {
    local library
    library=$(arm64_library)
    cp -a "$cache/source/source" "$1"
    patch_qemu "$1" "$library"
    configure_qemu "$1" --cross-prefix="$cross" --enable-kvm --disable-tcg --enable-vhost-user-timer
    # The cross-compiler does not search /usr/local.
    in_build "$1" C_INCLUDE_PATH=/usr/local/include ninja qemu-system-aarch64
    mv "$1/build/qemu-system-aarch64" "$1"
    rm -r "$1"/{build,local,source}
}
