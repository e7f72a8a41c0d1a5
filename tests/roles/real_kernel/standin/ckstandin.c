// Stands for a GPU driver: a module that DKMS builds, and that says its version.
#include <linux/init.h>
#include <linux/module.h>

static int __init ckstandin_init(void) { return 0; }
static void __exit ckstandin_exit(void) {}

module_init(ckstandin_init);
module_exit(ckstandin_exit);
MODULE_DESCRIPTION("stands for a GPU driver in a test");
MODULE_LICENSE("GPL");
MODULE_VERSION(CKSTANDIN_VERSION);
