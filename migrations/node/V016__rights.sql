-- Nobody calls the functions of the schema but their owner and whom they are granted to: most of them run with
-- their owner's rights. New functions begin with this too; what anybody may call is granted where it is made.

revoke execute on all functions in schema shardmq from public;
